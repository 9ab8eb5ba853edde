-- Times are microseconds since 1970-01-01T00:00:00Z. Ids and names compare byte by byte (COLLATE "C"), as everywhere in Tidegate.

CREATE TABLE devices (
    device_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- never used again, so that what a deleted device left can't become another's
    id           text   COLLATE "C" NOT NULL UNIQUE,
    labels       text   NOT NULL,                     -- a JSON object of strings
    display_name text   NOT NULL,
    revision     bigint NOT NULL,                     -- counts updates; the etag
    create_time  bigint NOT NULL,
    update_time  bigint NOT NULL
);

-- Devices that are gone, whose rows in the other tables are still being deleted.
CREATE TABLE deleted_devices (
    device_id bigint PRIMARY KEY
);

CREATE TABLE sensors (
    sensor_id        bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id        bigint  NOT NULL,
    name             text    COLLATE "C" NOT NULL,
    unit             text    NOT NULL,                -- empty: never said
    kind             integer NOT NULL,                -- 1 double, 2 int64, 3 bool, 4 text
    allow_non_finite boolean NOT NULL,
    create_time      bigint  NOT NULL,
    UNIQUE (device_id, name)
);

-- One row for each stream id: how far it has come, and its part of the device's ledger. It is updated in the transaction
-- that appends to the log, which is what makes a batch be stored exactly once. The free part of each page is for these
-- updates: they then touch no index.
CREATE TABLE streams (
    stream_key         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id          bigint NOT NULL,
    stream_id          bytea  NOT NULL,               -- the 16 bytes of a UUID
    last_sequence      bigint NOT NULL,
    stored_batches     bigint NOT NULL,
    stored_readings    bigint NOT NULL,
    duplicate_batches  bigint NOT NULL,
    duplicate_readings bigint NOT NULL,
    lost_batches       bigint NOT NULL,               -- as the device says
    lost_readings      bigint NOT NULL,
    receive_time       bigint NOT NULL,               -- of the last batch
    UNIQUE (device_id, stream_id)
) WITH (fillfactor = 50);

-- The last position that was given out. Who commits to the log takes this row last and holds it until the commit, so that
-- positions follow the order of commits, whichever gateway commits, and a transaction that fails leaves no hole.
CREATE TABLE log_head (
    position bigint NOT NULL
) WITH (fillfactor = 10);

INSERT INTO log_head (position) VALUES (0);

-- Every accepted batch in the order of commits: the truth that all else is made from.
CREATE TABLE log (
    position     bigint PRIMARY KEY,                  -- from log_head
    device_id    bigint NOT NULL,
    stream_key   bigint NOT NULL,
    sequence     bigint NOT NULL,
    receive_time bigint NOT NULL,
    first_time   bigint NOT NULL,
    last_time    bigint NOT NULL,
    readings     bigint NOT NULL,
    batch        bytea  NOT NULL                      -- tidegate.v1.Batch, as it was received
);

-- Trying to compress each batch would cost more than all the rest of an append.
ALTER TABLE log ALTER COLUMN batch SET STORAGE EXTERNAL;

CREATE INDEX log_by_device ON log (device_id, position);

-- Batches that can never be stored: the last of them, for inspection.
CREATE TABLE rejected_batches (
    rejection_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id    bigint NOT NULL,
    stream_key   bigint NOT NULL,
    sequence     bigint NOT NULL,
    receive_time bigint NOT NULL,
    reason       text   NOT NULL,                     -- tidegate.v1.RejectReason without its prefix
    field        text   NOT NULL,
    message      text   NOT NULL,
    readings     bigint NOT NULL,
    batch        bytea  NOT NULL
);

-- All that were ever rejected, counted.
CREATE TABLE rejected_counts (
    device_id bigint NOT NULL,
    reason    text   COLLATE "C" NOT NULL,
    batches   bigint NOT NULL,
    readings  bigint NOT NULL,
    PRIMARY KEY (device_id, reason)
);

-- The latest reading of each sensor up to a position of the log; what the log holds behind it is added at start.
CREATE TABLE latest_readings (
    sensor_id bigint PRIMARY KEY,
    device_id bigint NOT NULL,
    time      bigint NOT NULL,
    batch     bytea  NOT NULL,                        -- a tidegate.v1.Batch of this one reading
    position  bigint NOT NULL                         -- of the batch that it came with: of two gateways the one behind changes nothing
);

-- How far those who follow the log have come.
CREATE TABLE progress (
    name     text   PRIMARY KEY,
    position bigint NOT NULL
);

-- 'log_pruned': all positions up to it are gone from the log. 'write_probe': counts proofs that the database takes writes.
INSERT INTO progress (name, position) VALUES ('latest_readings', 0), ('log_pruned', 0), ('write_probe', 0);

CREATE TABLE config_revisions (
    device_id   bigint NOT NULL,
    revision    bigint NOT NULL,
    config      text   NOT NULL,                      -- a JSON object
    request_id  text   NOT NULL,
    comment     text   NOT NULL,
    create_time bigint NOT NULL,
    PRIMARY KEY (device_id, revision)
);

CREATE INDEX config_revisions_by_request ON config_revisions (device_id, request_id) WHERE request_id <> '';

-- The highest revision that a deleted device of this id had: the id's next device counts on from it, so that a number
-- never names two configurations to whoever remembers it.
CREATE TABLE retired_configs (
    id       text   PRIMARY KEY,
    revision bigint NOT NULL
);

-- How far the latest revision of each device has come.
CREATE TABLE config_states (
    device_id                 bigint  PRIMARY KEY,
    desired_revision          bigint  NOT NULL,
    delivered_revision        bigint  NOT NULL DEFAULT 0,
    delivered_time            bigint  NOT NULL DEFAULT 0,
    reported_revision         bigint  NOT NULL DEFAULT 0,
    reported_outcome          integer NOT NULL DEFAULT 0,  -- tidegate.v1.ConfigOutcome
    reported_detail           text    NOT NULL DEFAULT '',
    reported_time             bigint  NOT NULL DEFAULT 0,
    applied_revision          bigint  NOT NULL DEFAULT 0,  -- what the device runs with, by its reports
    previous_applied_revision bigint  NOT NULL DEFAULT 0   -- what it ran with before that, and goes back to
);
