-- Work to be done: one row for each scope, "look at this again". Whoever has something to be done writes here, and
-- those who do it write in work_claims, so that neither waits for the other. `generation` grows with each enqueue: what
-- was begun with another one has not seen the last.
CREATE TABLE leasehold.work_items (
    id           BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id    TEXT COLLATE "C" NOT NULL,
    kind         TEXT COLLATE "C" NOT NULL,
    scope_type   TEXT COLLATE "C" NOT NULL,
    scope_id     TEXT COLLATE "C" NOT NULL,
    payload      JSONB,
    priority     INTEGER NOT NULL,
    event_at     TIMESTAMPTZ NOT NULL,
    generation   BIGINT NOT NULL DEFAULT 1,
    max_attempts INTEGER NOT NULL CHECK (max_attempts > 0),
    -- Set while the item is not to be tried before this time: it takes the item out of the index that claims read. Only
    -- a hint; what counts is the row in work_claims.
    parked_until TIMESTAMPTZ,
    CONSTRAINT work_items_one_a_scope UNIQUE (tenant_id, kind, scope_type, scope_id)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
-- The order of claims.
CREATE INDEX work_items_claimable ON leasehold.work_items (kind, priority, event_at, id) WHERE parked_until IS NULL;
CREATE INDEX work_items_parked ON leasehold.work_items (kind, parked_until) WHERE parked_until IS NOT NULL;

-- Who works on an item, and what came of it before. Nobody takes the item before `expires_at`. Without a token nobody
-- has it: it waits for its next try, or for anybody.
-- Heartbeats change nothing but `expires_at`, which no index has, so that they stay on their page (HOT).
-- It does not refer to work_items, whose rows would have to be looked at with each. A row whose item is gone is swept.
CREATE TABLE leasehold.work_claims (
    item_id       BIGINT PRIMARY KEY,
    token         UUID,
    worker        TEXT,
    claimed_at    TIMESTAMPTZ,
    expires_at    TIMESTAMPTZ NOT NULL,
    generation    BIGINT NOT NULL,
    attempt_count INTEGER NOT NULL,
    last_error    TEXT,
    CONSTRAINT work_claims_held_whole_or_not_at_all CHECK (num_nulls(token, worker, claimed_at) IN (0, 3))
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);

-- What was given up, until somebody looks at it or it is too old.
CREATE TABLE leasehold.dead_letters (
    id            BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id     TEXT COLLATE "C" NOT NULL,
    kind          TEXT COLLATE "C" NOT NULL,
    scope_type    TEXT COLLATE "C" NOT NULL,
    scope_id      TEXT COLLATE "C" NOT NULL,
    payload       JSONB,
    priority      INTEGER NOT NULL,
    event_at      TIMESTAMPTZ NOT NULL,
    max_attempts  INTEGER NOT NULL CHECK (max_attempts > 0),
    attempt_count INTEGER NOT NULL,
    last_error    TEXT NOT NULL,
    failed_at     TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX dead_letters_tenant ON leasehold.dead_letters (tenant_id, id);
