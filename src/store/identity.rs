//! Operators, credentials and the audit log: their rows, and the statements on them, which are the same on both databases.

use crate::model::{Labels, Timestamp};

/// An operator's number in the store; never used for another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OperatorKey(pub i64);

/// An operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperatorRow {
    /// Its number.
    pub key: OperatorKey,
    /// Its name.
    pub name: String,
    /// The number of its role.
    pub role: i32,
    /// The label selector of the devices that it may see; empty: all.
    pub scope: String,
    /// When it was created.
    pub create_time: Timestamp,
    /// When it was last changed.
    pub update_time: Timestamp,
}

/// What a credential is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CredentialKind {
    /// The token of a device.
    Device,
    /// The token of an operator.
    Operator,
    /// A key with which devices make their own identities.
    Enrolment,
}

impl CredentialKind {
    /// The number that stands for it in the store.
    pub fn code(self) -> i32 {
        match self {
            Self::Device => 1,
            Self::Operator => 2,
            Self::Enrolment => 3,
        }
    }

    /// The kind of a [`code`](Self::code).
    pub fn from_code(code: i32) -> Option<Self> {
        [Self::Device, Self::Operator, Self::Enrolment].into_iter().find(|kind| kind.code() == code)
    }
}

/// A token or an enrolment key, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialRow {
    /// Its id.
    pub id: String,
    /// What it is for.
    pub kind: CredentialKind,
    /// The number of the device or operator; 0 for an enrolment key.
    pub owner: i64,
    /// The SHA-256 of its secret.
    pub secret_hash: Vec<u8>,
    /// What it is for, for people.
    pub description: String,
    /// Of an enrolment key: the labels of the devices that it enrols.
    pub labels: Labels,
    /// Of an enrolment key: how many devices it has enrolled.
    pub uses: u64,
    /// Of an enrolment key: how many it may.
    pub uses_max: u64,
    /// When it was created.
    pub create_time: Timestamp,
    /// When it expires; `None`: never.
    pub expire_time: Option<Timestamp>,
}

/// An entry of the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    /// Its number; 0 before it is stored.
    pub key: i64,
    /// When the call ended.
    pub time: Timestamp,
    /// Who: `operators/alice`.
    pub actor: String,
    /// The id of the token; empty where there is none.
    pub credential: String,
    /// The full name of the RPC.
    pub method: String,
    /// On what: `devices/pump-1`.
    pub resource: String,
    /// `OK`, or the name of a gRPC code.
    pub outcome: String,
    /// Where the call came from.
    pub peer: String,
    /// The call's request id.
    pub request_id: String,
}

/// Which entries of the audit log to read, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditQuery {
    /// Only of this actor; empty: of all.
    pub actor: String,
    /// Only on this resource; empty: on all.
    pub resource: String,
    /// Not before this time.
    pub start: Timestamp,
    /// Before this time.
    pub end: Timestamp,
    /// Before the entry of this number.
    pub before: i64,
    /// At most so many.
    pub rows_max: usize,
}

/// The methods of a store and its transactions on these rows; see [`Store`](super::Store) and [`WriteTx`](super::WriteTx).
macro_rules! identity_methods {
    ($store:ident, $tx:ident) => {
        impl $tx<'_> {
            pub async fn insert_operator(
                &mut self,
                name: &str,
                role: i32,
                scope: &str,
                now: Timestamp,
            ) -> Result<Option<OperatorRow>, StoreError> {
                let row = sqlx::query(
                    "INSERT INTO operators (name, role, scope, create_time, update_time) VALUES ($1, $2, $3, $4, $4) \
                     ON CONFLICT (name) DO NOTHING RETURNING *",
                )
                .bind(name)
                .bind(role)
                .bind(scope)
                .bind(now.micros())
                .fetch_optional(&mut self.connection)
                .await?;
                row.as_ref().map(operator_row).transpose()
            }

            pub async fn update_operator(
                &mut self,
                operator: OperatorKey,
                role: i32,
                scope: &str,
                now: Timestamp,
            ) -> Result<Option<OperatorRow>, StoreError> {
                // First, as where an operator is deleted: two gateways lock in one order.
                self.tell_owned(CredentialKind::Operator, operator.0, now).await?;
                let row = sqlx::query("UPDATE operators SET role = $2, scope = $3, update_time = $4 WHERE operator_id = $1 RETURNING *")
                    .bind(operator.0)
                    .bind(role)
                    .bind(scope)
                    .bind(now.micros())
                    .fetch_optional(&mut self.connection)
                    .await?;
                row.as_ref().map(operator_row).transpose()
            }

            pub async fn delete_operator(&mut self, operator: OperatorKey, now: Timestamp) -> Result<bool, StoreError> {
                self.revoke_owned(CredentialKind::Operator, operator.0, now).await?;
                let query = sqlx::query("DELETE FROM operators WHERE operator_id = $1").bind(operator.0);
                Ok(query.execute(&mut self.connection).await?.rows_affected() > 0)
            }

            pub async fn insert_credential(&mut self, row: &CredentialRow) -> Result<(), StoreError> {
                sqlx::query(
                    "INSERT INTO credentials (id, kind, owner, secret_hash, description, labels, uses, uses_max, create_time, expire_time) \
                     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
                )
                .bind(&row.id)
                .bind(row.kind.code())
                .bind(row.owner)
                .bind(&row.secret_hash)
                .bind(&row.description)
                .bind(row.labels.to_json())
                .bind(as_integer(row.uses))
                .bind(as_integer(row.uses_max))
                .bind(row.create_time.micros())
                .bind(row.expire_time.map_or(0, Timestamp::micros))
                .execute(&mut self.connection)
                .await?;
                Ok(())
            }

            pub async fn revoke_credential(&mut self, id: &str, now: Timestamp) -> Result<bool, StoreError> {
                self.begin_revoking().await?;
                let insert = "INSERT INTO revocations (credential, revoke_time) SELECT id, $2 FROM credentials WHERE id = $1";
                sqlx::query(insert).bind(id).bind(now.micros()).execute(&mut self.connection).await?;
                let query = sqlx::query("DELETE FROM credentials WHERE id = $1").bind($crate::store::rows::text(id));
                let gone = query.execute(&mut self.connection).await?.rows_affected() > 0;
                self.notify_revoked().await?;
                Ok(gone)
            }

            /// Revokes all of an owner.
            pub async fn revoke_owned(&mut self, kind: CredentialKind, owner: i64, now: Timestamp) -> Result<(), StoreError> {
                self.tell_owned(kind, owner, now).await?;
                let query = sqlx::query("DELETE FROM credentials WHERE kind = $1 AND owner = $2").bind(kind.code()).bind(owner);
                query.execute(&mut self.connection).await?;
                Ok(())
            }

            /// Tells the gateways to look at an owner's credentials anew.
            async fn tell_owned(&mut self, kind: CredentialKind, owner: i64, now: Timestamp) -> Result<(), StoreError> {
                self.begin_revoking().await?;
                sqlx::query(
                    "INSERT INTO revocations (credential, revoke_time) SELECT id, $3 FROM credentials WHERE kind = $1 AND owner = $2",
                )
                .bind(kind.code())
                .bind(owner)
                .bind(now.micros())
                .execute(&mut self.connection)
                .await?;
                self.notify_revoked().await
            }

            async fn begin_revoking(&mut self) -> Result<(), StoreError> {
                let update = "UPDATE progress SET position = position + 1 WHERE name = 'revocations'";
                sqlx::query(update).execute(&mut self.connection).await?;
                Ok(())
            }

            pub async fn use_enrolment_key(&mut self, id: &str) -> Result<bool, StoreError> {
                let query = sqlx::query("UPDATE credentials SET uses = uses + 1 WHERE id = $1 AND kind = 3 AND uses < uses_max").bind(id);
                Ok(query.execute(&mut self.connection).await?.rows_affected() > 0)
            }

            pub async fn give_back_enrolment_key(&mut self, id: &str) -> Result<(), StoreError> {
                let query = sqlx::query("UPDATE credentials SET uses = uses - 1 WHERE id = $1 AND kind = 3 AND uses > 0").bind(id);
                query.execute(&mut self.connection).await?;
                Ok(())
            }

            pub async fn insert_audit(&mut self, row: &AuditRow) -> Result<(), StoreError> {
                sqlx::query(
                    "INSERT INTO audit_log (time, actor, credential, method, resource, outcome, peer, request_id) \
                     VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
                )
                .bind(row.time.micros())
                .bind(&row.actor)
                .bind(&row.credential)
                .bind(&row.method)
                .bind(&row.resource)
                .bind(&row.outcome)
                .bind(&row.peer)
                .bind(&row.request_id)
                .execute(&mut self.connection)
                .await?;
                Ok(())
            }

            pub async fn forget_revocations_before(&mut self, time: Timestamp) -> Result<(), StoreError> {
                let query = sqlx::query("DELETE FROM revocations WHERE revoke_time < $1").bind(time.micros());
                query.execute(&mut self.connection).await?;
                Ok(())
            }

            pub async fn forget_audit_before(&mut self, time: Timestamp, rows_max: usize) -> Result<u64, StoreError> {
                let query = sqlx::query(
                    "DELETE FROM audit_log WHERE entry_id IN (SELECT entry_id FROM audit_log WHERE time < $1 ORDER BY entry_id LIMIT $2)",
                );
                Ok(query.bind(time.micros()).bind(rows_max as i64).execute(&mut self.connection).await?.rows_affected())
            }
        }

        impl $store {
            pub async fn operators_len(&self) -> Result<usize, StoreError> {
                let count: i64 = sqlx::query_scalar("SELECT count(*) FROM operators").fetch_one(self.readers()).await?;
                Ok(usize::try_from(count).unwrap_or(0))
            }

            pub async fn operator(&self, name: &str) -> Result<Option<OperatorRow>, StoreError> {
                let row = sqlx::query("SELECT * FROM operators WHERE name = $1")
                    .bind($crate::store::rows::text(name))
                    .fetch_optional(self.readers())
                    .await?;
                row.as_ref().map(operator_row).transpose()
            }

            pub async fn operator_by_key(&self, operator: OperatorKey) -> Result<Option<OperatorRow>, StoreError> {
                let query = sqlx::query("SELECT * FROM operators WHERE operator_id = $1").bind(operator.0);
                query.fetch_optional(self.readers()).await?.as_ref().map(operator_row).transpose()
            }

            pub async fn operators(&self, after: &str, rows_max: usize) -> Result<Vec<OperatorRow>, StoreError> {
                let query = sqlx::query("SELECT * FROM operators WHERE name > $1 ORDER BY name LIMIT $2")
                    .bind($crate::store::rows::text(after))
                    .bind(rows_max as i64);
                query.fetch_all(self.readers()).await?.iter().map(operator_row).collect()
            }

            pub async fn credential(&self, id: &str) -> Result<Option<CredentialRow>, StoreError> {
                let row = sqlx::query("SELECT * FROM credentials WHERE id = $1").bind(id).fetch_optional(self.readers()).await?;
                row.as_ref().map(credential_row).transpose()
            }

            pub async fn credentials(&self, kind: CredentialKind, owner: i64) -> Result<Vec<CredentialRow>, StoreError> {
                let query = sqlx::query("SELECT * FROM credentials WHERE kind = $1 AND owner = $2 ORDER BY create_time, id");
                query.bind(kind.code()).bind(owner).fetch_all(self.readers()).await?.iter().map(credential_row).collect()
            }

            pub async fn last_revocation(&self) -> Result<i64, StoreError> {
                let last: Option<i64> = sqlx::query_scalar("SELECT max(revocation_id) FROM revocations").fetch_one(self.readers()).await?;
                Ok(last.unwrap_or(0))
            }

            pub async fn revocations_after(&self, after: i64) -> Result<Vec<(i64, String)>, StoreError> {
                let query = sqlx::query("SELECT * FROM revocations WHERE revocation_id > $1 ORDER BY revocation_id").bind(after);
                let rows = query.fetch_all(self.readers()).await?;
                rows.iter().map(|row| Ok((column(row, "revocation_id")?, column(row, "credential")?))).collect()
            }

            pub async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditRow>, StoreError> {
                let rows = sqlx::query(
                    "SELECT * FROM audit_log WHERE ($1 = '' OR actor = $1) AND ($2 = '' OR resource = $2) \
                     AND time >= $3 AND time < $4 AND entry_id < $5 ORDER BY entry_id DESC LIMIT $6",
                )
                .bind($crate::store::rows::text(&query.actor))
                .bind($crate::store::rows::text(&query.resource))
                .bind(query.start.micros())
                .bind(query.end.micros())
                .bind(query.before)
                .bind(query.rows_max as i64)
                .fetch_all(self.readers())
                .await?;
                rows.iter().map(audit_row).collect()
            }
        }
    };
}

pub(super) use identity_methods;
