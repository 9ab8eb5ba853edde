//! An OpenID Connect provider, as far as a gateway sees of it: an address that answers with keys.

use super::{
    certificates::Pair,
    jwt::{AUDIENCE, ISSUER},
};
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};
use tidegate::config::{AuthMode, Config};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader},
    net::TcpListener,
    task::AbortHandle,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

/// What a provider does when it is asked.
#[derive(Clone)]
pub enum Answer {
    /// Answers with this body.
    Keys(String),
    /// Answers with this instead of a response with a body.
    Raw(String),
    /// Takes connections and never answers.
    Silence,
    /// Closes connections at once.
    Away,
}

/// See the [module](self). Gone when it is dropped.
pub struct Provider {
    pub address: SocketAddr,
    answer: Arc<Mutex<Answer>>,
    asked: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Provider {
    pub async fn start(answer: Answer) -> Self {
        Self::start_with(answer, None).await
    }

    /// With a certificate.
    pub async fn start_tls(answer: Answer, pair: &Pair) -> Self {
        let chain = vec![CertificateDer::from_pem_slice(pair.certificate.as_bytes()).expect("PEM")];
        let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).expect("PEM");
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().expect("there are some");
        let tls = builder.with_no_client_auth().with_single_cert(chain, key).expect("a pair");
        Self::start_with(answer, Some(TlsAcceptor::from(Arc::new(tls)))).await
    }

    async fn start_with(answer: Answer, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (answer, asked) = (Arc::new(Mutex::new(answer)), Arc::<AtomicUsize>::default());
        let (answers, count) = (answer.clone(), asked.clone());
        let serve = async move {
            while let Ok((stream, _)) = listener.accept().await {
                let answer = answers.lock().expect("no panic under the lock").clone();
                count.fetch_add(1, Ordering::SeqCst);
                let tls = tls.clone();
                tokio::spawn(async move {
                    match tls {
                        // A client that does not trust it ends the handshake.
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => respond(stream, answer).await,
                            Err(_) => Ok(()),
                        },
                        None => respond(stream, answer).await,
                    }
                });
            }
        };
        let task = tokio::spawn(serve).abort_handle();
        Self { address, answer, asked, task }
    }

    /// From now on it does this.
    pub fn answer(&self, answer: Answer) {
        *self.answer.lock().expect("no panic under the lock") = answer;
    }

    /// How often it was asked.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// Where its keys are.
    pub fn url(&self) -> String {
        format!("http://{}/keys?of=tide", self.address)
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn respond(stream: impl AsyncRead + AsyncWrite + Unpin, answer: Answer) -> std::io::Result<()> {
    if matches!(answer, Answer::Away) {
        return Ok(());
    }
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") && stream.read_line(&mut head).await? > 0 {}
    let response = match answer {
        Answer::Keys(body) => {
            assert!(head.starts_with("GET /keys?of=tide HTTP/1.1\r\n"), "{head}");
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        }
        Answer::Raw(response) => response,
        Answer::Silence => std::future::pending().await,
        Answer::Away => String::new(),
    };
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await
}

/// Has a gateway take tokens of the provider whose keys are there.
pub fn trust(config: &mut Config, jwks: impl Into<String>) {
    config.auth.mode = AuthMode::Required;
    config.oidc.issuer = ISSUER.into();
    config.oidc.audience = AUDIENCE.into();
    config.oidc.jwks = jwks.into();
}
