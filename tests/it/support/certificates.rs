//! A certificate authority of a test's own.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod,
    KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use std::path::PathBuf;
use tempfile::TempDir;
use tidegate::client::Credentials;

/// A certificate with its key, both as PEM.
#[derive(Clone)]
pub struct Pair {
    pub certificate: String,
    pub key: String,
    pub serial: u64,
}

/// An authority, and a directory for its files.
pub struct Authority {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
    directory: TempDir,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, "Test authority");
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("signed").pem();
        Self { pem, issuer: Issuer::new(params, key), directory: TempDir::new().expect("a directory") }
    }

    /// A certificate for this machine.
    pub fn server(&self) -> Pair {
        let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("names");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(params, 1)
    }

    /// A certificate for a device, which is named by its URI.
    pub fn device(&self, id: &str, serial: u64) -> Pair {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        let uri = format!("urn:tidegate:device:{id}").try_into().expect("ASCII");
        params.subject_alt_names = vec![SanType::URI(uri)];
        self.client(params, serial)
    }

    /// A certificate for a device, which is named by its subject's common name.
    pub fn device_by_common_name(&self, id: &str, serial: u64) -> Pair {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.distinguished_name.push(DnType::CommonName, id);
        self.client(params, serial)
    }

    fn client(&self, mut params: CertificateParams, serial: u64) -> Pair {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, serial)
    }

    fn sign(&self, mut params: CertificateParams, serial: u64) -> Pair {
        params.serial_number = Some(SerialNumber::from(serial));
        params.not_after = date_time_ymd(2096, 10, 2);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed").pem();
        Pair { certificate, key: key.serialize_pem(), serial }
    }

    /// A list that revokes these certificates.
    pub fn revocation_list(&self, revoked: &[&Pair]) -> String {
        let entry = |pair: &&Pair| RevokedCertParams {
            serial_number: SerialNumber::from(pair.serial),
            revocation_time: date_time_ymd(2026, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2026, 1, 1),
            next_update: date_time_ymd(2096, 1, 1),
            crl_number: SerialNumber::from(revoked.len() as u64 + 1),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).expect("signed").pem().expect("PEM")
    }

    /// Writes a file, or replaces it at once as a whole.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        let new = self.path("new");
        std::fs::write(&new, content).expect("written");
        std::fs::rename(&new, &path).expect("replaced");
        path
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What a client needs that trusts this authority.
    pub fn trust(&self) -> Credentials {
        Credentials { authorities: Some(self.pem.clone().into_bytes()), ..Credentials::default() }
    }

    /// The same that shows a certificate.
    pub fn trust_as(&self, pair: &Pair) -> Credentials {
        let certificate = Some((pair.certificate.clone().into_bytes(), pair.key.clone().into_bytes()));
        Credentials { certificate, ..self.trust() }
    }
}

/// The settings of a gateway with this certificate, whose files `authority` keeps.
pub fn settings(authority: &Authority, pair: &Pair) -> tidegate::config::Tls {
    let mut settings = tidegate::config::Config::default().tls;
    settings.certificate_file = authority.write("server.pem", &pair.certificate);
    settings.key_file = authority.write("server.key", &pair.key);
    settings
}

/// The same that takes client certificates of `authority`, and no revoked ones.
pub fn mutual_settings(authority: &Authority, pair: &Pair) -> tidegate::config::Tls {
    let mut settings = settings(authority, pair);
    settings.client_ca_file = authority.write("clients.pem", &authority.pem);
    settings.client_crl_file = authority.write("clients.crl", &authority.revocation_list(&[]));
    settings
}
