//! Operators, credentials and the audit log.

use super::{
    PostgresStore, PostgresTx,
    rows::{audit_row, column, credential_row, operator_row},
};
use crate::{
    model::Timestamp,
    store::{
        AuditQuery, AuditRow, Change, CredentialKind, CredentialRow, OperatorKey, OperatorRow, StoreError, identity::identity_methods,
        rows::as_integer,
    },
};

identity_methods!(PostgresStore, PostgresTx);

impl PostgresTx<'_> {
    async fn notify_revoked(&mut self) -> Result<(), StoreError> {
        self.notify(Change::Revocations).await
    }
}
