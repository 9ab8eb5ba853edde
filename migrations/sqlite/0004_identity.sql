-- Who may call, and how each is known.

CREATE TABLE operators (
    operator_id INTEGER PRIMARY KEY AUTOINCREMENT, -- never used again, so that a deleted one's tokens can't become another's
    name        TEXT    NOT NULL UNIQUE,
    role        INTEGER NOT NULL,                  -- tidegate.v1.OperatorRole
    scope       TEXT    NOT NULL,                  -- a label selector; empty: every device
    create_time INTEGER NOT NULL,
    update_time INTEGER NOT NULL
) STRICT;

-- Tokens and enrolment keys. Of the secret only its SHA-256 is kept: it has 256 random bits, which nobody guesses from that.
CREATE TABLE credentials (
    id          TEXT    PRIMARY KEY,
    kind        INTEGER NOT NULL,                  -- 1 token of a device, 2 token of an operator, 3 enrolment key
    owner       INTEGER NOT NULL,                  -- device_id, operator_id, or 0
    secret_hash BLOB    NOT NULL,
    description TEXT    NOT NULL,
    labels      TEXT    NOT NULL,                  -- of an enrolment key: those of the devices that it enrols, a JSON object
    uses        INTEGER NOT NULL,                  -- of an enrolment key: the devices that it has enrolled
    uses_max    INTEGER NOT NULL,
    create_time INTEGER NOT NULL,
    expire_time INTEGER NOT NULL                   -- 0: never
) STRICT, WITHOUT ROWID;

CREATE INDEX credentials_by_owner ON credentials (kind, owner);

-- Credentials that no longer are what they were, in the order of commits: gateways forget what they know of them.
CREATE TABLE revocations (
    revocation_id INTEGER PRIMARY KEY AUTOINCREMENT,
    credential    TEXT    NOT NULL,
    revoke_time   INTEGER NOT NULL
) STRICT;

-- What operators did.
CREATE TABLE audit_log (
    entry_id   INTEGER PRIMARY KEY AUTOINCREMENT,
    time       INTEGER NOT NULL,
    actor      TEXT    NOT NULL,                   -- operators/alice
    credential TEXT    NOT NULL,                   -- the id of the token; empty where there is none
    method     TEXT    NOT NULL,                   -- the full name of the RPC
    resource   TEXT    NOT NULL,                   -- devices/pump-1; empty where the call did not come to name one
    outcome    TEXT    NOT NULL,                   -- OK, or the name of a gRPC code
    peer       TEXT    NOT NULL,
    request_id TEXT    NOT NULL
) STRICT;

CREATE INDEX audit_log_by_time ON audit_log (time);

-- 'revocations': counts the transactions that revoke.
INSERT INTO progress (name, position) VALUES ('revocations', 0);
