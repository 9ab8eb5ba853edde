//! Where the keys of an issuer come from: a file, or one GET.

use crate::config::{self, JwksLocation};
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::{io, net::SocketAddr, path::PathBuf, sync::Arc};
use tokio::{
    fs::File,
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::{TcpStream, lookup_host},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        self, ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};
use tokio_util::task::AbortOnDropHandle;
use url::{Host, Position, Url};

/// How large a set of keys may be.
const JWKS_BYTES_MAX: usize = 256 << 10;
/// How much of a response's head is read before it is given up.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// Why there are no keys from there.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The file can't be read.
    #[error("cannot read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is larger than what is read.
    #[error("there are more than {JWKS_BYTES_MAX} bytes")]
    TooLarge,
    /// The authorities can't be used.
    #[error("cannot use {path} (oidc.ca_file): it must hold certificates (PEM)")]
    Authorities {
        /// The file.
        path: PathBuf,
    },
    /// The clear way leads to another machine.
    #[error("{0} is not this machine: its keys could be exchanged on the way without TLS")]
    NotLoopback(String),
    /// Nobody answers there.
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    /// TLS can't be used.
    #[error("cannot make TLS ready")]
    Tls(#[from] rustls::Error),
    /// What came is not HTTP, or breaks off.
    #[error("the exchange failed")]
    Http(#[from] hyper::Error),
    /// The answer is another one than the keys.
    #[error("the answer is {0}; redirects are not followed")]
    Status(StatusCode),
    /// The answer breaks off, or is too large.
    #[error("the answer cannot be read: at most {JWKS_BYTES_MAX} bytes are taken")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Where keys come from.
#[derive(Debug)]
pub struct Source {
    location: JwksLocation,
    ca_file: PathBuf,
}

impl Source {
    /// As the settings say.
    pub fn new(settings: &config::Oidc, location: JwksLocation) -> Self {
        Self { location, ca_file: settings.ca_file.clone() }
    }

    /// Whether it is a file, which is there at the start or is a mistake.
    pub fn is_file(&self) -> bool {
        matches!(self.location, JwksLocation::File(_))
    }

    /// Checks what can be checked without asking anybody.
    pub fn check(&self) -> Result<(), SourceError> {
        self.tls().map(|_| ())
    }

    /// What is there now. Takes as long as it takes: whoever waits has a limit.
    pub async fn read(&self) -> Result<Vec<u8>, SourceError> {
        match &self.location {
            JwksLocation::File(path) => {
                let mut text = Vec::new();
                let read = async { File::open(path).await?.take(JWKS_BYTES_MAX as u64 + 1).read_to_end(&mut text).await };
                read.await.map_err(|source| SourceError::File { path: path.clone(), source })?;
                if text.len() > JWKS_BYTES_MAX { Err(SourceError::TooLarge) } else { Ok(text) }
            }
            JwksLocation::Url(url) => {
                let stream = connect(url).await?;
                if url.scheme() == "http" {
                    return get(url, stream).await;
                }
                let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
                let name = ServerName::try_from(host).map_err(|error| SourceError::Connect(io::Error::other(error)))?;
                let stream = TlsConnector::from(Arc::new(self.tls()?)).connect(name, stream).await.map_err(SourceError::Connect)?;
                get(url, stream).await
            }
        }
    }

    /// Read anew each time, as authorities change, too.
    fn tls(&self) -> Result<ClientConfig, SourceError> {
        let mut roots = RootCertStore::empty();
        if self.ca_file.as_os_str().is_empty() {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        } else {
            let unusable = || SourceError::Authorities { path: self.ca_file.clone() };
            for authority in CertificateDer::pem_file_iter(&self.ca_file).map_err(|_| unusable())? {
                roots.add(authority.map_err(|_| unusable())?).map_err(|_| unusable())?;
            }
            if roots.is_empty() {
                return Err(unusable());
            }
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions()?;
        let mut tls = builder.with_root_certificates(roots).with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(tls)
    }
}

async fn connect(url: &Url) -> Result<TcpStream, SourceError> {
    let port = url.port_or_known_default().unwrap_or_default();
    let mut addresses: Vec<SocketAddr> = match url.host() {
        Some(Host::Domain(name)) => lookup_host((name, port)).await.map_err(SourceError::Connect)?.collect(),
        Some(Host::Ipv4(ip)) => vec![(ip, port).into()],
        Some(Host::Ipv6(ip)) => vec![(ip, port).into()],
        None => Vec::new(),
    };
    if url.scheme() == "http" {
        // Whatever a name server or a hosts file says of localhost.
        addresses.retain(|address| address.ip().to_canonical().is_loopback());
        if addresses.is_empty() {
            return Err(SourceError::NotLoopback(url.host_str().unwrap_or_default().to_owned()));
        }
    }
    TcpStream::connect(addresses.as_slice()).await.map_err(SourceError::Connect)
}

async fn get(url: &Url, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Vec<u8>, SourceError> {
    let (mut sender, connection) = http1::Builder::new().max_buf_size(HEAD_BYTES_MAX).handshake(TokioIo::new(stream)).await?;
    // Its errors come by the sender, too.
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let request = Request::get(&url[Position::BeforePath..Position::AfterQuery])
        .header(header::HOST, &url[Position::BeforeHost..Position::AfterPort])
        .header(header::ACCEPT, "application/json")
        .header(header::USER_AGENT, concat!("tidegate/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .expect("a parsed URL has a path and a host that are header values");
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        return Err(SourceError::Status(response.status()));
    }
    let body = Limited::new(response.into_body(), JWKS_BYTES_MAX).collect().await.map_err(SourceError::Body)?;
    Ok(body.to_bytes().to_vec())
}
