//! Where the keys of an OpenID Connect provider are.

use std::path::PathBuf;
use url::{Host, Url};

/// What the setting `oidc.jwks` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JwksLocation {
    /// A file.
    File(PathBuf),
    /// `https://`, or `http://` on this machine.
    Url(Url),
}

impl JwksLocation {
    /// Reads a path or an address; `None` for what is neither, for other schemes, and for a clear way to another machine.
    pub fn parse(text: &str) -> Option<Self> {
        if !text.contains("://") {
            return (!text.is_empty()).then(|| Self::File(text.into()));
        }
        let url = Url::parse(text).ok()?;
        let is_here = match url.host()? {
            // What it resolves to is looked at when it is connected to.
            Host::Domain(name) => name == "localhost",
            Host::Ipv4(ip) => ip.is_loopback(),
            Host::Ipv6(ip) => ip.to_canonical().is_loopback(),
        };
        let plain = url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
        (plain && (url.scheme() == "https" || url.scheme() == "http" && is_here)).then_some(Self::Url(url))
    }

    /// Whether TLS leads there.
    pub fn is_https(&self) -> bool {
        matches!(self, Self::Url(url) if url.scheme() == "https")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_from_a_file_over_tls_or_from_this_machine() {
        let allowed = [
            "/etc/tidegate/jwks.json",
            "jwks.json",
            "https://sso.example.com/realms/tide/protocol/openid-connect/certs",
            "http://127.0.0.1:5556/dex/keys",
            "http://[::1]:5556/keys",
            "http://localhost/keys",
        ];
        for text in allowed {
            assert!(JwksLocation::parse(text).is_some(), "{text}");
        }
        let refused = [
            "",
            "http://sso.example.com/keys",
            "http://localhost.example.com/keys",
            "http://0.0.0.0/keys",
            "http://[::ffff:10.0.0.1]/keys",
            "file:///etc/jwks.json",
            "ftp://127.0.0.1/keys",
            "https://",
            "https://user:secret@sso.example.com/keys",
        ];
        for text in refused {
            assert_eq!(JwksLocation::parse(text), None, "{text}");
        }
    }
}
