-- Who may call, and how each is known.

CREATE TABLE operators (
    operator_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- never used again, so that a deleted one's tokens can't become another's
    name        text    COLLATE "C" NOT NULL UNIQUE,
    role        integer NOT NULL,                  -- tidegate.v1.OperatorRole
    scope       text    NOT NULL,                  -- a label selector; empty: every device
    create_time bigint  NOT NULL,
    update_time bigint  NOT NULL
);

-- Tokens and enrolment keys. Of the secret only its SHA-256 is kept: it has 256 random bits, which nobody guesses from that.
CREATE TABLE credentials (
    id          text    COLLATE "C" PRIMARY KEY,
    kind        integer NOT NULL,                  -- 1 token of a device, 2 token of an operator, 3 enrolment key
    owner       bigint  NOT NULL,                  -- device_id, operator_id, or 0
    secret_hash bytea   NOT NULL,
    description text    NOT NULL,
    labels      text    NOT NULL,                  -- of an enrolment key: those of the devices that it enrols, a JSON object
    uses        bigint  NOT NULL,                  -- of an enrolment key: the devices that it has enrolled
    uses_max    bigint  NOT NULL,
    create_time bigint  NOT NULL,
    expire_time bigint  NOT NULL                   -- 0: never
);

CREATE INDEX credentials_by_owner ON credentials (kind, owner);

-- Credentials that no longer are what they were, in the order of commits: gateways forget what they know of them.
CREATE TABLE revocations (
    revocation_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    credential    text   NOT NULL,
    revoke_time   bigint NOT NULL
);

-- What operators did.
CREATE TABLE audit_log (
    entry_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    time       bigint NOT NULL,
    actor      text   NOT NULL,                    -- operators/alice
    credential text   NOT NULL,                    -- the id of the token; empty where there is none
    method     text   NOT NULL,                    -- the full name of the RPC
    resource   text   NOT NULL,                    -- devices/pump-1; empty where the call did not come to name one
    outcome    text   NOT NULL,                    -- OK, or the name of a gRPC code
    peer       text   NOT NULL,
    request_id text   NOT NULL
);

CREATE INDEX audit_log_by_time ON audit_log (time);

-- 'revocations': counts the transactions that revoke. Who revokes holds this row until its commit, so that the numbers of
-- revocations follow the order of commits.
INSERT INTO progress (name, position) VALUES ('revocations', 0);
