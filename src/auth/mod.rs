//! Who calls, and what each may do.
//!
//! A call's way: [`Authenticator::identify`] finds out who calls, from a token of the gateway's own, one of a provider ([`Oidc`]) or a
//! client certificate; the [`policy`] says whether such a one may call the method at all; a handler asks its [`Caller`] about the
//! devices. Each of these is decided before it is looked whether what the call names exists.
//!
//! Invariants: nothing is decided from a secret but by comparing hashes in constant time; what can't be checked is refused; a
//! credential that was revoked ends the calls that were begun with it, on all gateways.

mod audit;
mod authenticator;
mod directory;
mod oidc;
pub mod policy;
mod principal;
pub(crate) mod token;

pub use audit::{AuditLog, PendingEntry};
pub use authenticator::{Authenticator, Identity};
pub use directory::{Directory, Issue};
pub use oidc::{Oidc, OidcError};
pub use policy::{Access, Rule};
pub use principal::{Attribution, Caller, Ending, Grant, Operator, Principal, Role};
pub use token::{NewToken, Presented};
