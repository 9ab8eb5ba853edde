//! A way to a PostgreSQL server that can be cut: it hands bytes on until something shall happen to them.

use super::eventually;
use std::{io, net::SocketAddr};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

/// The end of the message by which a transaction is committed.
const COMMIT: &[u8] = b"COMMIT\0";

/// What happens to connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// All is handed on.
    Open,
    /// All are cut, and new ones at once.
    Closed,
    /// Whatever is sent stays on the way; new connections are taken, and get no answer.
    Stalled,
    /// Closed with the next commit, which the server does not get.
    CutBeforeCommit,
    /// Closed with the next commit, which the server gets.
    CutInCommit,
    /// Closed with the next commit, which the server has done.
    CutAfterCommit,
}

/// See the [module](self).
pub struct Proxy {
    pub port: u16,
    way: watch::Sender<Way>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// An open way to a port of this machine.
    pub async fn start(server_port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let way = watch::Sender::new(Way::Open);
        let ways = way.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // However it ends, the gateway finds that it has.
                tokio::spawn(hand_on(client, SocketAddr::from(([127, 0, 0, 1], server_port)), ways.clone()));
            }
        });
        Self { port, way, accepting }
    }

    /// From now on this happens.
    pub fn set(&self, way: Way) {
        self.way.send_replace(way);
    }

    /// Waits for a commit to be cut.
    pub async fn was_cut(&self) {
        eventually("a commit is cut", || async { (*self.way.borrow() == Way::Closed).then_some(()) }).await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.way.send_replace(Way::Closed);
    }
}

async fn hand_on(mut client: TcpStream, server: SocketAddr, way: watch::Sender<Way>) -> io::Result<()> {
    let mut ways = way.subscribe();
    let mut server = TcpStream::connect(server).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut from_client, mut from_server) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let now = *ways.borrow_and_update();
        if now == Way::Closed {
            return Ok(());
        }
        tokio::select! {
            changed = ways.changed() => if changed.is_err() { return Ok(()) },
            read = client.read(&mut from_client), if now != Way::Stalled => {
                let bytes = &from_client[..read?];
                if bytes.is_empty() {
                    return Ok(());
                }
                let commits = bytes.windows(COMMIT.len()).any(|window| window == COMMIT);
                if commits && now != Way::Open {
                    way.send_replace(Way::Closed);
                    if now != Way::CutBeforeCommit {
                        server.write_all(bytes).await?;
                    }
                    if now == Way::CutAfterCommit {
                        // Some of the answer, which the gateway does not get: the server has done it.
                        let _answered = server.read(&mut from_server).await?;
                    }
                    return Ok(());
                }
                server.write_all(bytes).await?;
            }
            read = server.read(&mut from_server), if now != Way::Stalled => match read? {
                0 => return Ok(()),
                read => client.write_all(&from_server[..read]).await?,
            },
        }
    }
}
