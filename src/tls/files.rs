//! What the files of the settings hold, made ready for handshakes.

use crate::config;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio_rustls::rustls::{
    self, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject},
    server::{VerifierBuilderError, WebPkiClientVerifier, danger::ClientCertVerifier},
};

/// The one application protocol that is spoken behind the handshake.
const ALPN: &[u8] = b"h2";

/// Why files can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read, or holds no PEM of the kind that is needed.
    #[error("cannot use {path} ({setting})")]
    File {
        /// The setting that names it.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: rustls::pki_types::pem::Error,
    },
    /// A certificate is not one.
    #[error("{path} ({setting}) holds what is not a certificate")]
    Certificate {
        /// The setting that names it.
        setting: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Certificate and key do not go together.
    #[error("tls.certificate_file and tls.key_file do not go together")]
    Pair(#[source] rustls::Error),
    /// The authorities or the revocation lists can't be used.
    #[error("tls.client_ca_file or tls.client_crl_file can't be used")]
    Clients(#[source] VerifierBuilderError),
}

/// What was read.
pub struct Loaded {
    /// For handshakes.
    pub server: Arc<ServerConfig>,
    /// Who checks client certificates.
    pub clients: Option<Arc<dyn ClientCertVerifier>>,
    /// When the first certificate of the gateway's own chain expires, in seconds since the epoch.
    pub expiry_seconds: i64,
}

impl Loaded {
    /// Reads all files. They may be replaced one after the other: a pair that does not match is refused, and read again later.
    pub fn read(settings: &config::Tls) -> Result<Self, TlsError> {
        let chain = certificates("tls.certificate_file", &settings.certificate_file)?;
        let key = PrivateKeyDer::from_pem_file(&settings.key_file).map_err(file_error("tls.key_file", &settings.key_file))?;
        let expiry_seconds = soonest_expiry(&chain)
            .ok_or_else(|| TlsError::Certificate { setting: "tls.certificate_file", path: settings.certificate_file.clone() })?;
        let provider = Arc::new(ring::default_provider());
        let clients = client_verifier(settings, &provider)?;
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(TlsError::Pair)?;
        let builder = match &clients {
            Some(clients) => builder.with_client_cert_verifier(clients.clone()),
            None => builder.with_no_client_auth(),
        };
        let mut server = builder.with_single_cert(chain, key).map_err(TlsError::Pair)?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self { server: Arc::new(server), clients, expiry_seconds })
    }
}

/// Client certificates are checked where one is shown; whoever shows none needs a token.
fn client_verifier(settings: &config::Tls, provider: &Arc<CryptoProvider>) -> Result<Option<Arc<dyn ClientCertVerifier>>, TlsError> {
    const SETTING: &str = "tls.client_ca_file";
    if settings.client_ca_file.as_os_str().is_empty() {
        return Ok(None);
    }
    let mut roots = RootCertStore::empty();
    for authority in certificates(SETTING, &settings.client_ca_file)? {
        roots.add(authority).map_err(|_| TlsError::Certificate { setting: SETTING, path: settings.client_ca_file.clone() })?;
    }
    let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).allow_unauthenticated();
    if !settings.client_crl_file.as_os_str().is_empty() {
        // A certificate whose issuer has no list here is refused: nobody could tell whether it is revoked.
        builder = builder.with_crls(revocation_lists(&settings.client_crl_file)?).only_check_end_entity_revocation();
    }
    builder.build().map(Some).map_err(TlsError::Clients)
}

fn certificates(setting: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = found.map_err(file_error(setting, path))?;
    if found.is_empty() {
        return Err(TlsError::Certificate { setting, path: path.to_owned() });
    }
    Ok(found)
}

fn revocation_lists(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let found = CertificateRevocationListDer::pem_file_iter(path).and_then(Iterator::collect);
    found.map_err(file_error("tls.client_crl_file", path))
}

fn file_error(setting: &'static str, path: &Path) -> impl FnOnce(rustls::pki_types::pem::Error) -> TlsError {
    let path = path.to_owned();
    move |source| TlsError::File { setting, path, source }
}

fn soonest_expiry(chain: &[CertificateDer<'_>]) -> Option<i64> {
    let expiry = |certificate: &CertificateDer<'_>| {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
        Some(parsed.validity().not_after.timestamp())
    };
    chain.iter().map(expiry).collect::<Option<Vec<_>>>()?.into_iter().min()
}

/// Tells whether the files have changed. One that can't be read counts as empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(blake3::Hash);

impl Fingerprint {
    /// Of the files of the settings as they are now.
    pub fn of(settings: &config::Tls) -> Self {
        let mut hasher = blake3::Hasher::new();
        for path in [&settings.certificate_file, &settings.key_file, &settings.client_ca_file, &settings.client_crl_file] {
            let content = fs::read(path).unwrap_or_default();
            hasher.update(&content.len().to_le_bytes()).update(&content);
        }
        Self(hasher.finalize())
    }
}
