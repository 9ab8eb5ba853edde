-- Times are microseconds since 1970-01-01T00:00:00Z. Tables are STRICT, so that a wrong type is an error and not a surprise.

CREATE TABLE devices (
    device_id    INTEGER PRIMARY KEY AUTOINCREMENT, -- never used again, so that what a deleted device left can't become another's
    id           TEXT    NOT NULL UNIQUE,
    labels       TEXT    NOT NULL,                  -- a JSON object of strings
    display_name TEXT    NOT NULL,
    revision     INTEGER NOT NULL,                  -- counts updates; the etag
    create_time  INTEGER NOT NULL,
    update_time  INTEGER NOT NULL
) STRICT;

-- Devices that are gone, whose rows in the other tables are still being deleted.
CREATE TABLE deleted_devices (
    device_id INTEGER PRIMARY KEY
) STRICT;

CREATE TABLE sensors (
    sensor_id        INTEGER PRIMARY KEY AUTOINCREMENT,
    device_id        INTEGER NOT NULL,
    name             TEXT    NOT NULL,
    unit             TEXT    NOT NULL,              -- empty: never said
    kind             INTEGER NOT NULL,              -- 1 double, 2 int64, 3 bool, 4 text
    allow_non_finite INTEGER NOT NULL,
    create_time      INTEGER NOT NULL,
    UNIQUE (device_id, name)
) STRICT;

-- One row for each stream id: how far it has come, and its part of the device's ledger. It is updated in the transaction
-- that appends to the log, which is what makes a batch be stored exactly once.
CREATE TABLE streams (
    stream_key         INTEGER PRIMARY KEY,
    device_id          INTEGER NOT NULL,
    stream_id          BLOB    NOT NULL,            -- the 16 bytes of a UUID
    last_sequence      INTEGER NOT NULL,
    stored_batches     INTEGER NOT NULL,
    stored_readings    INTEGER NOT NULL,
    duplicate_batches  INTEGER NOT NULL,
    duplicate_readings INTEGER NOT NULL,
    lost_batches       INTEGER NOT NULL,            -- as the device says
    lost_readings      INTEGER NOT NULL,
    receive_time       INTEGER NOT NULL,            -- of the last batch
    UNIQUE (device_id, stream_id)
) STRICT;

-- Every accepted batch in the order of commits: the truth that all else is made from.
CREATE TABLE log (
    position     INTEGER PRIMARY KEY AUTOINCREMENT, -- never used again, also when the end of the log is deleted
    device_id    INTEGER NOT NULL,
    stream_key   INTEGER NOT NULL,
    sequence     INTEGER NOT NULL,
    receive_time INTEGER NOT NULL,
    first_time   INTEGER NOT NULL,
    last_time    INTEGER NOT NULL,
    readings     INTEGER NOT NULL,
    batch        BLOB    NOT NULL                   -- tidegate.v1.Batch, as it was received
) STRICT;

CREATE INDEX log_by_device ON log (device_id, position);

-- Batches that can never be stored: the last of them, for inspection.
CREATE TABLE rejected_batches (
    rejection_id INTEGER PRIMARY KEY AUTOINCREMENT,
    device_id    INTEGER NOT NULL,
    stream_key   INTEGER NOT NULL,
    sequence     INTEGER NOT NULL,
    receive_time INTEGER NOT NULL,
    reason       TEXT    NOT NULL,                  -- tidegate.v1.RejectReason without its prefix
    field        TEXT    NOT NULL,
    message      TEXT    NOT NULL,
    readings     INTEGER NOT NULL,
    batch        BLOB    NOT NULL
) STRICT;

-- All that were ever rejected, counted.
CREATE TABLE rejected_counts (
    device_id INTEGER NOT NULL,
    reason    TEXT    NOT NULL,
    batches   INTEGER NOT NULL,
    readings  INTEGER NOT NULL,
    PRIMARY KEY (device_id, reason)
) STRICT, WITHOUT ROWID;

-- The latest reading of each sensor up to a position of the log; what the log holds behind it is added at start.
CREATE TABLE latest_readings (
    sensor_id INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL,
    time      INTEGER NOT NULL,
    batch     BLOB    NOT NULL                      -- a tidegate.v1.Batch of this one reading
) STRICT;

-- How far those who follow the log have come.
CREATE TABLE progress (
    name     TEXT PRIMARY KEY,
    position INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- 'log_pruned': all positions up to it are gone from the log. 'write_probe': counts proofs that the database takes writes.
INSERT INTO progress (name, position) VALUES ('latest_readings', 0), ('log_pruned', 0), ('write_probe', 0);

CREATE TABLE config_revisions (
    device_id   INTEGER NOT NULL,
    revision    INTEGER NOT NULL,
    config      TEXT    NOT NULL,                   -- a JSON object
    request_id  TEXT    NOT NULL,
    comment     TEXT    NOT NULL,
    create_time INTEGER NOT NULL,
    PRIMARY KEY (device_id, revision)
) STRICT, WITHOUT ROWID;

CREATE INDEX config_revisions_by_request ON config_revisions (device_id, request_id) WHERE request_id <> '';

-- The highest revision that a deleted device of this id had: the id's next device counts on from it, so that a number
-- never names two configurations to whoever remembers it.
CREATE TABLE retired_configs (
    id       TEXT    PRIMARY KEY,
    revision INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- How far the latest revision of each device has come.
CREATE TABLE config_states (
    device_id                 INTEGER PRIMARY KEY,
    desired_revision          INTEGER NOT NULL,
    delivered_revision        INTEGER NOT NULL DEFAULT 0,
    delivered_time            INTEGER NOT NULL DEFAULT 0,
    reported_revision         INTEGER NOT NULL DEFAULT 0,
    reported_outcome          INTEGER NOT NULL DEFAULT 0,  -- tidegate.v1.ConfigOutcome
    reported_detail           TEXT    NOT NULL DEFAULT '',
    reported_time             INTEGER NOT NULL DEFAULT 0,
    applied_revision          INTEGER NOT NULL DEFAULT 0,  -- what the device runs with, by its reports
    previous_applied_revision INTEGER NOT NULL DEFAULT 0   -- what it ran with before that, and goes back to
) STRICT;
