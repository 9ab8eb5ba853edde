//! Operators, credentials and the audit log.

use super::{
    SqliteStore, SqliteTx,
    rows::{audit_row, column, credential_row, operator_row},
};
use crate::{
    model::Timestamp,
    store::{
        AuditQuery, AuditRow, CredentialKind, CredentialRow, OperatorKey, OperatorRow, StoreError, identity::identity_methods,
        rows::as_integer,
    },
};

identity_methods!(SqliteStore, SqliteTx);

impl SqliteTx<'_> {
    /// There are no other gateways.
    #[allow(clippy::unused_async, reason = "as on the other database")]
    async fn notify_revoked(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
}
