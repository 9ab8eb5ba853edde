//! The certificate that a client has shown, for as long as its connection lasts.

use crate::model::{DeviceId, Timestamp};
use std::fmt;
use tokio_rustls::rustls::{
    pki_types::{CertificateDer, UnixTime},
    server::danger::ClientCertVerifier,
};
use tokio_util::sync::CancellationToken;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName};

/// Where the URI begins that names a device in a certificate's subject alternative names.
pub const DEVICE_URI_PREFIX: &str = "urn:tidegate:device:";

/// The certificate that a client showed in the TLS handshake of its connection.
pub struct PeerCertificate {
    chain: Vec<CertificateDer<'static>>,
    /// The device that it names; the error says why it names none.
    pub device: Result<DeviceId, String>,
    /// When it expires.
    pub expire_time: Timestamp,
    /// Cancelled when it is no longer good.
    pub revoked: CancellationToken,
}

impl fmt::Debug for PeerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerCertificate").field("device", &self.device).finish_non_exhaustive()
    }
}

impl PeerCertificate {
    /// Of a chain that a handshake has found to be good.
    pub fn new(chain: &[CertificateDer<'_>]) -> Result<Self, String> {
        let first = chain.first().ok_or("the chain is empty")?;
        let (_, parsed) = x509_parser::parse_x509_certificate(first).map_err(|why| why.to_string())?;
        let expire_micros = parsed.validity().not_after.timestamp().saturating_mul(1_000_000);
        Ok(Self {
            chain: chain.iter().map(|certificate| certificate.clone().into_owned()).collect(),
            device: device_of(&parsed),
            expire_time: Timestamp::from_micros(expire_micros).unwrap_or(Timestamp::MAX),
            revoked: CancellationToken::new(),
        })
    }

    /// Whether it would be taken now.
    pub fn is_good(&self, clients: &dyn ClientCertVerifier) -> bool {
        let Some((first, rest)) = self.chain.split_first() else { return false };
        clients.verify_client_cert(first, rest, UnixTime::now()).is_ok()
    }
}

/// The device that a certificate names: by the URI `urn:tidegate:device:ID` among its subject alternative names; without one, by
/// its subject's common name.
fn device_of(certificate: &X509Certificate<'_>) -> Result<DeviceId, String> {
    let names = certificate.subject_alternative_name().map_err(|why| why.to_string())?;
    let mut uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix(DEVICE_URI_PREFIX),
        _ => None,
    });
    if let Some(id) = uris.next() {
        return match uris.next() {
            None => DeviceId::parse(id),
            Some(_) => Err("the certificate names several devices".to_owned()),
        };
    }
    let common_name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    common_name.map_or_else(|| Err("the certificate names no device".to_owned()), DeviceId::parse)
}
