//! What gateways on one database tell one another: `NOTIFY` in the transaction that makes the change, so that it comes with
//! the commit or not at all. A notification says what to look at, and carries no data.

use super::PostgresStore;
use crate::{
    model::Position,
    store::{Change, DeviceKey, StoreError},
};
use sqlx::postgres::PgListener;
use uuid::Uuid;

/// The channel of all gateways on the database.
pub(super) const CHANNEL: &str = "tidegate";

/// The changes that other gateways make, from when this was made.
pub struct PostgresChanges {
    listener: PgListener,
    gateway: Uuid,
}

impl PostgresStore {
    pub async fn changes(&self) -> Result<PostgresChanges, StoreError> {
        // A pool of its own: the readers' may be busy, and ends before this does.
        let pool = sqlx::postgres::PgPoolOptions::new().max_connections(1).connect_lazy_with(self.shared.options.clone());
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.ignore_pool_close_event(true);
        // Whoever listens looks at everything after the connection is lost, and then makes a new one.
        listener.eager_reconnect(false);
        listener.listen(CHANNEL).await?;
        Ok(PostgresChanges { listener, gateway: self.shared.gateway })
    }
}

impl PostgresChanges {
    /// The next change; `None` when the connection is lost, and with it perhaps some changes.
    pub async fn next(&mut self) -> Result<Option<Change>, StoreError> {
        loop {
            let Some(notification) = self.listener.try_recv().await? else { return Ok(None) };
            if let Some(change) = parse(notification.payload(), self.gateway) {
                return Ok(Some(change));
            }
        }
    }
}

pub(super) fn payload(gateway: Uuid, change: Change) -> String {
    match change {
        Change::Log(position) => format!("{}{}", log_payload(gateway), position.0),
        Change::Device(device) => format!("{} device {}", gateway.simple(), device.0),
        Change::Config(device) => format!("{} config {}", gateway.simple(), device.0),
        Change::Revocations => format!("{} revocations 0", gateway.simple()),
    }
}

/// The payload of [`Change::Log`] up to its position, which the statement that appends adds.
pub(super) fn log_payload(gateway: Uuid) -> String {
    format!("{} log ", gateway.simple())
}

/// `None` for what this gateway said itself, and for what a later version may say.
fn parse(payload: &str, gateway: Uuid) -> Option<Change> {
    let mut words = payload.split(' ');
    let from_self = words.next()? == gateway.simple().to_string();
    let (what, number) = (words.next()?, words.next()?.parse().ok()?);
    let change = match what {
        "log" => Change::Log(Position(number)),
        "device" => Change::Device(DeviceKey(number)),
        "config" => Change::Config(DeviceKey(number)),
        "revocations" => Change::Revocations,
        _ => return None,
    };
    (!from_self).then_some(change)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_understood_by_others_and_ignored_by_its_own_gateway() {
        let (here, there) = (Uuid::new_v4(), Uuid::new_v4());
        for change in [Change::Log(Position(7)), Change::Device(DeviceKey(8)), Change::Config(DeviceKey(9)), Change::Revocations] {
            let payload = payload(here, change);
            assert_eq!((parse(&payload, there), parse(&payload, here)), (Some(change), None));
        }
        assert_eq!(parse("x something-new 1", here), None);
        assert_eq!(parse("", here), None);
    }
}
