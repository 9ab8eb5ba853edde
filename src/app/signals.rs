//! SIGTERM and SIGINT: the first asks for a drain, the second ends the process at once. SIGXFSZ ends nothing: a write beyond
//! the limit on file sizes (setrlimit(2)) is then an error like that of a full disk, from which the gateway recovers. SIGHUP
//! ends nothing, either: it has the gateway look at its files at once.

use std::{io, sync::Arc};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::Notify,
};

/// The exit code after a second signal, as a shell shows a process that SIGINT ended.
const EXIT_CODE_INTERRUPTED: i32 = 130;

/// The signals' handlers. From here on the signals no longer end the process by themselves.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    // None: somebody listens to it.
    hangup: Option<Signal>,
    _file_size: Signal,
}

impl Signals {
    /// Installs the handlers.
    pub fn install() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: Some(signal(SignalKind::hangup())?),
            _file_size: signal(SignalKind::from_raw(libc::SIGXFSZ))?,
        })
    }

    /// Notifies `reload` at each SIGHUP from now on.
    pub fn reload_with(&mut self, reload: Arc<Notify>) {
        let Some(mut hangup) = self.hangup.take() else { return };
        tokio::spawn(async move {
            while hangup.recv().await.is_some() {
                reload.notify_one();
            }
        });
    }

    /// Returns at the first signal. The second one then ends the process at once, whatever it does.
    pub async fn stop(mut self) {
        self.next().await;
        tokio::spawn(async move {
            self.next().await;
            tracing::warn!("gateway.killed: a second signal came during the drain");
            std::process::exit(EXIT_CODE_INTERRUPTED);
        });
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
