//! Operators, credentials and the audit log.

use super::*;
use crate::support::database::on_each_database;
use tidegate::store::{AuditQuery, AuditRow, CredentialKind, CredentialRow};

on_each_database!(
    operators_are_added_once_changed_and_deleted_with_their_tokens,
    revocations_are_told_in_the_order_of_commits,
    an_enrolment_key_enrols_no_more_than_it_may,
    the_audit_log_is_read_newest_first_and_forgets_what_is_old,
);

fn credential(id: &str, kind: CredentialKind, owner: i64) -> CredentialRow {
    CredentialRow {
        id: id.into(),
        kind,
        owner,
        secret_hash: vec![0, 1, 0xff],
        description: "für Köln".into(),
        labels: Labels::parse("labels", [("site".to_owned(), "Köln".to_owned())]).expect("good"),
        uses: 0,
        uses_max: 2,
        create_time: at(0),
        expire_time: None,
    }
}

async fn operators_are_added_once_changed_and_deleted_with_their_tokens(database: Database) {
    let fixture = Fixture::on(database).await;
    let store = &fixture.store;
    let mut tx = store.begin().await.expect("begun");
    let alice = tx.insert_operator("alice", 1, "site=berlin", at(1)).await.expect("inserted").expect("the name is free");
    assert_eq!(tx.insert_operator("alice", 2, "", at(2)).await.expect("asked"), None, "the name is taken");
    let bob = tx.insert_operator("Bob", 2, "", at(2)).await.expect("inserted").expect("the name is free");
    for (id, owner) in [("a2", alice.key.0), ("a1", alice.key.0), ("b1", bob.key.0)] {
        tx.insert_credential(&credential(id, CredentialKind::Operator, owner)).await.expect("inserted");
    }
    tx.commit().await.expect("committed");
    assert_eq!(store.operator("alice").await.expect("read").as_ref(), Some(&alice));
    assert_eq!(store.operator("Alice").await.expect("read"), None, "names differ by case");
    let names = async |after, rows_max| {
        let rows = store.operators(after, rows_max).await.expect("read");
        rows.into_iter().map(|row| row.name).collect::<Vec<_>>()
    };
    assert_eq!((names("", 10).await, names("Bob", 10).await), (vec!["Bob".to_owned(), "alice".to_owned()], vec!["alice".to_owned()]));
    assert_eq!((names("", 1).await.len(), store.operators_len().await.expect("read")), (1, 2));

    let mut tx = store.begin().await.expect("begun");
    let changed = tx.update_operator(alice.key, 3, "", at(5)).await.expect("asked").expect("there");
    assert_eq!((changed.role, &*changed.scope, changed.create_time, changed.update_time), (3, "", at(1), at(5)));
    assert!(tx.delete_operator(bob.key, at(6)).await.expect("deleted"));
    assert!(!tx.delete_operator(bob.key, at(6)).await.expect("asked"), "there is none any more");
    assert_eq!(tx.update_operator(bob.key, 1, "", at(6)).await.expect("asked"), None);
    tx.commit().await.expect("committed");
    assert_eq!(store.operator_by_key(alice.key).await.expect("read"), Some(changed));
    assert_eq!(store.operator_by_key(bob.key).await.expect("read"), None);
    assert_eq!(store.credential("b1").await.expect("read"), None);
    let tokens = store.credentials(CredentialKind::Operator, alice.key.0).await.expect("read");
    assert_eq!(tokens.iter().map(|row| &*row.id).collect::<Vec<_>>(), ["a1", "a2"]);
    assert_eq!(tokens[0], credential("a1", CredentialKind::Operator, alice.key.0));
    let mut told: Vec<_> = store.revocations_after(0).await.expect("read").into_iter().map(|(_, credential)| credential).collect();
    told.sort_unstable();
    assert_eq!(told, ["a1", "a2", "b1"], "whoever uses one of them is looked at anew");
    store.close().await;
}

async fn revocations_are_told_in_the_order_of_commits(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    assert_eq!(store.last_revocation().await.expect("read"), 0);
    let mut tx = store.begin().await.expect("begun");
    for id in ["x", "y", "z"] {
        let expire_time = (id == "z").then(|| at(9));
        tx.insert_credential(&CredentialRow { expire_time, ..credential(id, CredentialKind::Device, device.0) }).await.expect("inserted");
    }
    tx.commit().await.expect("committed");
    let expires = async |id| store.credential(id).await.expect("read").expect("there").expire_time;
    assert_eq!((expires("z").await, expires("x").await), (Some(at(9)), None));
    let revoke = async |id| {
        let mut tx = store.begin().await.expect("begun");
        let was_there = tx.revoke_credential(id, at(3)).await.expect("revoked");
        tx.commit().await.expect("committed");
        was_there
    };
    assert_eq!([revoke("y").await, revoke("y").await, revoke("x").await], [true, false, true]);
    let all = store.revocations_after(0).await.expect("read");
    assert_eq!(all.iter().map(|(_, credential)| &**credential).collect::<Vec<_>>(), ["y", "x"]);
    assert_eq!(store.revocations_after(all[0].0).await.expect("read"), all[1..]);
    assert_eq!(store.last_revocation().await.expect("read"), all[1].0);
    fixture.delete_device().await;
    let after = store.revocations_after(all[1].0).await.expect("read");
    assert_eq!(after.into_iter().map(|(_, credential)| credential).collect::<Vec<_>>(), ["z"], "gone with its device");
    assert_eq!(store.credential("z").await.expect("read"), None);
    store.close().await;
}

async fn an_enrolment_key_enrols_no_more_than_it_may(database: Database) {
    let fixture = Fixture::on(database).await;
    let store = &fixture.store;
    let mut tx = store.begin().await.expect("begun");
    tx.insert_credential(&credential("key", CredentialKind::Enrolment, 0)).await.expect("inserted");
    tx.insert_credential(&credential("token", CredentialKind::Device, fixture.device.0)).await.expect("inserted");
    let mut used = Vec::new();
    for id in ["key", "key", "key", "token", "none"] {
        used.push(tx.use_enrolment_key(id).await.expect("asked"));
    }
    assert_eq!(used, [true, true, false, false, false]);
    tx.give_back_enrolment_key("key").await.expect("given back");
    assert!(tx.use_enrolment_key("key").await.expect("asked"));
    tx.commit().await.expect("committed");
    let keys = store.credentials(CredentialKind::Enrolment, 0).await.expect("read");
    assert_eq!(keys, [CredentialRow { uses: 2, ..credential("key", CredentialKind::Enrolment, 0) }]);
    store.close().await;
}

async fn the_audit_log_is_read_newest_first_and_forgets_what_is_old(database: Database) {
    let fixture = Fixture::on(database).await;
    let store = &fixture.store;
    let entry = |seconds, actor: &str, resource: &str| AuditRow {
        key: 0,
        time: at(seconds),
        actor: actor.into(),
        credential: "a1".into(),
        method: "tidegate.v1.DeviceService/UpdateDevice".into(),
        resource: resource.into(),
        outcome: "OK".into(),
        peer: "[::1]:9".into(),
        request_id: "r".into(),
    };
    let entries = [entry(1, "operators/a", "devices/x"), entry(2, "operators/b", "devices/x"), entry(3, "operators/a", "devices/y")];
    let mut tx = store.begin().await.expect("begun");
    for entry in &entries {
        tx.insert_audit(entry).await.expect("inserted");
    }
    tx.commit().await.expect("committed");
    let all = AuditQuery { actor: String::new(), resource: String::new(), start: at(0), end: at(99), before: i64::MAX, rows_max: 10 };
    let found = store.audit(&all).await.expect("read");
    let without_keys = found.iter().rev().map(|row| AuditRow { key: 0, ..row.clone() });
    assert_eq!(without_keys.collect::<Vec<_>>(), entries);
    let seconds = async |query: AuditQuery| {
        let rows = store.audit(&query).await.expect("read");
        rows.iter().map(|row| (row.time.micros() - T0) / SECOND).collect::<Vec<_>>()
    };
    assert_eq!(seconds(AuditQuery { rows_max: 2, ..all.clone() }).await, [3, 2]);
    assert_eq!(seconds(AuditQuery { before: found[1].key, ..all.clone() }).await, [1]);
    assert_eq!(seconds(AuditQuery { actor: "operators/a".into(), ..all.clone() }).await, [3, 1]);
    assert_eq!(seconds(AuditQuery { resource: "devices/x".into(), ..all.clone() }).await, [2, 1]);
    assert_eq!(seconds(AuditQuery { start: at(2), end: at(3), ..all.clone() }).await, [2], "the start is in the span, the end is not");
    let mut tx = store.begin().await.expect("begun");
    assert_eq!(tx.forget_audit_before(at(3), 1).await.expect("deleted"), 1, "a part");
    assert_eq!(tx.forget_audit_before(at(3), 10).await.expect("deleted"), 1, "the rest");
    tx.commit().await.expect("committed");
    assert_eq!(seconds(all).await, [3]);
    store.close().await;
}
