//! Makes and revokes credentials, and keeps the operators.

use super::{Authenticator, NewToken, Role};
use crate::{
    error::{Error, Failure},
    model::{LabelSelector, Labels, Timestamp},
    store::{CredentialKind, CredentialRow, OperatorKey, OperatorRow, Store, StoreError},
};
use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// How many tokens a device or an operator may have at once: some, so that a new one can be given out before the old is revoked.
const TOKENS_MAX: usize = 10;
/// How many enrolment keys there may be.
const ENROLMENT_KEYS_MAX: usize = 1_000;
/// The name of the first operator.
const FIRST_ADMIN: &str = "admin";

/// A credential to make.
pub struct Issue {
    /// What it is for.
    pub kind: CredentialKind,
    /// The number of the device or operator; 0 for an enrolment key.
    pub owner: i64,
    /// What it is for, for people.
    pub description: String,
    /// When it expires.
    pub expire_time: Option<Timestamp>,
    /// Of an enrolment key: the labels of the devices that it enrols.
    pub labels: Labels,
    /// Of an enrolment key: how many devices it may enrol.
    pub uses_max: u64,
}

/// Makes and revokes credentials, and keeps the operators. Cheap to clone.
#[derive(Clone)]
pub struct Directory {
    store: Store,
    auth: Authenticator,
}

impl Directory {
    /// That of what `store` holds; `auth` learns at once what was revoked.
    pub fn new(store: Store, auth: Authenticator) -> Self {
        Self { store, auth }
    }

    /// Makes the first operator, an administrator, when there is none, and leaves its token in a file.
    pub async fn begin(&self, token_file: &Path) -> Result<(), StoreError> {
        if self.store.operators_len().await? > 0 {
            return Ok(());
        }
        let now = Timestamp::now();
        let mut tx = self.store.begin().await?;
        // Another gateway may have been quicker.
        let Some(admin) = tx.insert_operator(FIRST_ADMIN, Role::Admin.code(), "", now).await? else { return tx.rollback().await };
        let token = NewToken::generate(CredentialKind::Operator);
        let issue = Issue::token(CredentialKind::Operator, admin.key.0, "made at the first start".to_owned(), None);
        tx.insert_credential(&row(&token, issue, now)).await?;
        let path = token_file.display().to_string();
        write_secret(token_file, &token.text).map_err(|source| StoreError::Directory { path: path.clone(), source })?;
        tx.commit().await?;
        tracing::warn!(file = path, "auth.first_admin: there was no operator; the token of a new one is in this file");
        Ok(())
    }

    /// Makes a credential; returns what is kept of it, and the token.
    pub async fn issue(&self, issue: Issue) -> Result<(CredentialRow, String), Failure> {
        let (kind, owner) = (issue.kind, issue.owner);
        let limit = if kind == CredentialKind::Enrolment { ENROLMENT_KEYS_MAX } else { TOKENS_MAX };
        if self.store.credentials(kind, owner).await?.len() >= limit {
            let field = match kind {
                CredentialKind::Device => "device",
                CredentialKind::Operator => "operator",
                CredentialKind::Enrolment => "enrolment_key",
            };
            return Err(Error::invalid(field, format!("there are {limit} already, which is the most: revoke one first")).into());
        }
        let token = NewToken::generate(kind);
        let row = row(&token, issue, Timestamp::now());
        let mut tx = self.store.begin().await?;
        tx.insert_credential(&row).await?;
        tx.commit().await?;
        Ok((row, token.text))
    }

    /// The credentials of an owner.
    pub async fn credentials(&self, kind: CredentialKind, owner: i64) -> Result<Vec<CredentialRow>, StoreError> {
        self.store.credentials(kind, owner).await
    }

    /// Makes a credential of an owner void; returns when all calls that were begun with it on this gateway are told to end.
    pub async fn revoke(&self, kind: CredentialKind, owner: i64, id: &str) -> Result<(), Failure> {
        let not_found = || Failure::from(Error::CredentialNotFound(id.to_owned()));
        self.store.credential(id).await?.filter(|row| row.kind == kind && row.owner == owner).ok_or_else(not_found)?;
        let mut tx = self.store.begin().await?;
        let was_there = tx.revoke_credential(id, Timestamp::now()).await?;
        tx.commit().await?;
        self.auth.catch_up().await?;
        if was_there { Ok(()) } else { Err(not_found()) }
    }

    /// One enrolment key.
    pub async fn enrolment_key(&self, id: &str) -> Result<CredentialRow, Failure> {
        let row = self.store.credential(id).await?.filter(|row| row.kind == CredentialKind::Enrolment);
        row.ok_or_else(|| Error::CredentialNotFound(id.to_owned()).into())
    }

    /// Counts one more device that an enrolment key enrols.
    pub async fn use_enrolment_key(&self, id: &str) -> Result<(), Failure> {
        let mut tx = self.store.begin().await?;
        if tx.use_enrolment_key(id).await? {
            return Ok(tx.commit().await?);
        }
        tx.rollback().await?;
        Err(Error::EnrolmentKeyUsedUp.into())
    }

    /// Takes back what was counted.
    pub async fn give_back_enrolment_key(&self, id: &str) -> Result<(), StoreError> {
        let mut tx = self.store.begin().await?;
        tx.give_back_enrolment_key(id).await?;
        tx.commit().await
    }

    /// An operator by its name.
    pub async fn operator(&self, name: &str) -> Result<OperatorRow, Failure> {
        self.store.operator(name).await?.ok_or_else(|| Error::OperatorNotFound(name.to_owned()).into())
    }

    /// Operators in the order of their names, behind the name `after`.
    pub async fn operators(&self, after: &str, operators_max: usize) -> Result<Vec<OperatorRow>, StoreError> {
        self.store.operators(after, operators_max).await
    }

    /// Adds an operator.
    pub async fn create_operator(&self, name: &str, role: Role, scope: &str) -> Result<OperatorRow, Failure> {
        debug_assert!(LabelSelector::parse(scope).is_ok());
        let mut tx = self.store.begin().await?;
        let Some(created) = tx.insert_operator(name, role.code(), scope, Timestamp::now()).await? else {
            tx.rollback().await?;
            return Err(Error::OperatorExists(name.to_owned()).into());
        };
        tx.commit().await?;
        Ok(created)
    }

    /// Changes an operator.
    pub async fn update_operator(&self, name: &str, role: Role, scope: &str) -> Result<OperatorRow, Failure> {
        debug_assert!(LabelSelector::parse(scope).is_ok());
        let key = self.operator(name).await?.key;
        let mut tx = self.store.begin().await?;
        let updated = tx.update_operator(key, role.code(), scope, Timestamp::now()).await?;
        tx.commit().await?;
        self.auth.catch_up().await?;
        updated.ok_or_else(|| Error::OperatorNotFound(name.to_owned()).into())
    }

    /// Deletes an operator with its tokens.
    pub async fn delete_operator(&self, name: &str) -> Result<(), Failure> {
        let key: OperatorKey = self.operator(name).await?.key;
        let mut tx = self.store.begin().await?;
        let was_there = tx.delete_operator(key, Timestamp::now()).await?;
        tx.commit().await?;
        self.auth.catch_up().await?;
        if was_there { Ok(()) } else { Err(Error::OperatorNotFound(name.to_owned()).into()) }
    }
}

impl Issue {
    /// A token for a device or an operator.
    pub fn token(kind: CredentialKind, owner: i64, description: String, expire_time: Option<Timestamp>) -> Self {
        Self { kind, owner, description, expire_time, labels: Labels::default(), uses_max: 0 }
    }
}

fn row(token: &NewToken, issue: Issue, now: Timestamp) -> CredentialRow {
    let Issue { kind, owner, description, expire_time, labels, uses_max } = issue;
    let (id, secret_hash) = (token.id.clone(), token.hash.to_vec());
    CredentialRow { id, kind, owner, secret_hash, description, labels, uses: 0, uses_max, create_time: now, expire_time }
}

/// Writes a file that only its owner may read, in the place of one that may be there: nobody has read that one's token any more
/// when there is no operator.
fn write_secret(path: &Path, secret: &str) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{secret}")?;
    file.sync_all()
}
