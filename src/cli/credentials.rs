//! Whom a command trusts, and how it is known.

use super::Failure;
use crate::client::Credentials;
use clap::Args;
use std::path::{Path, PathBuf};

/// The variable that may hold a token itself; there is no flag for it, as everybody on a machine sees all command lines.
const TOKEN_VARIABLE: &str = "TIDEGATE_TOKEN";

/// What a client shows of itself: a token, or a certificate with its key.
#[derive(Debug, Clone, Default, Args)]
pub struct CredentialArgs {
    /// The authorities that the gateway's certificate comes from (PEM). Default: the public ones. For https only.
    #[arg(long, value_name = "FILE", env = "TIDEGATE_CA_FILE")]
    pub ca_file: Option<PathBuf>,
    /// A client certificate with its chain (PEM). For https only.
    #[arg(long, value_name = "FILE", env = "TIDEGATE_CLIENT_CERTIFICATE_FILE", requires = "client_key_file")]
    pub client_certificate_file: Option<PathBuf>,
    /// The client certificate's key (PEM).
    #[arg(long, value_name = "FILE", env = "TIDEGATE_CLIENT_KEY_FILE", requires = "client_certificate_file")]
    pub client_key_file: Option<PathBuf>,
    /// A file that holds a token. The variable TIDEGATE_TOKEN may hold the token itself.
    #[arg(long, value_name = "FILE", env = "TIDEGATE_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
}

impl CredentialArgs {
    /// Reads all files.
    pub fn load(&self) -> Result<Credentials, Failure> {
        let authorities = self.ca_file.as_deref().map(read).transpose()?;
        let certificate = self.client_certificate_file.as_deref().zip(self.client_key_file.as_deref());
        let certificate = certificate.map(|(chain, key)| Ok::<_, Failure>((read(chain)?, read(key)?))).transpose()?;
        let token = match &self.token_file {
            Some(path) => Some(read_token(path)?),
            None => std::env::var(TOKEN_VARIABLE).ok().filter(|token| !token.is_empty()),
        };
        Ok(Credentials { authorities, certificate, token })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|why| Failure::Usage(format!("cannot read {}: {why}", path.display())))
}

fn read_token(path: &Path) -> Result<String, Failure> {
    let text = String::from_utf8(read(path)?).unwrap_or_default();
    match text.trim() {
        "" => Err(Failure::Usage(format!("{} holds no token", path.display()))),
        token => Ok(token.to_owned()),
    }
}
