CREATE SCHEMA IF NOT EXISTS leasehold;

-- One row a name. A released row stays: its token is what makes the next one higher. Half a page is left free so
-- that the updates of a busy row stay on its page (HOT), and nothing but the key is indexed for the same reason.
CREATE TABLE leasehold.leases (
    name          TEXT PRIMARY KEY,
    lock_id       UUID,
    operation     TEXT,
    locked_by     TEXT,
    instance      TEXT,
    metadata      JSONB,
    acquired_at   TIMESTAMPTZ,
    expires_at    TIMESTAMPTZ,
    fencing_token BIGINT NOT NULL DEFAULT 0,
    used_at       TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT leases_held_whole_or_not_at_all CHECK (
        num_nulls(lock_id, operation, locked_by, acquired_at, expires_at) IN (0, 5)
    ),
    CONSTRAINT leases_end_after_they_begin CHECK (expires_at > acquired_at)
) WITH (fillfactor = 50);

-- No token below or at the floor is given out again, whatever rows were removed meanwhile.
CREATE TABLE leasehold.token_floor (
    only_row BOOLEAN PRIMARY KEY DEFAULT true CHECK (only_row),
    floor    BIGINT NOT NULL DEFAULT 0
);
INSERT INTO leasehold.token_floor DEFAULT VALUES;

-- The next token of a name whose last one was `last`. The high bits are the WAL timeline, which a promoted
-- standby raises: its tokens are above all of the old primary's, also those it never heard of.
-- PL/pgSQL keeps the plan for the session; a function in SQL is planned again by every statement that calls it, which
-- took longer than all the rest of an acquire.
CREATE FUNCTION leasehold.next_token(last BIGINT) RETURNS BIGINT
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN greatest(
        last + 1,
        (SELECT floor FROM leasehold.token_floor) + 1,
        ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint << 40
    );
END
$$;

-- Call it in the transaction that removes rows, with the highest token among them.
CREATE FUNCTION leasehold.raise_token_floor(token BIGINT) RETURNS VOID
LANGUAGE sql VOLATILE AS $$
    UPDATE leasehold.token_floor SET floor = token WHERE floor < token
$$;

-- What the deployment has agreed on; see `leasehold migrate`.
CREATE TABLE leasehold.settings (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

-- Who took locks away from whom.
CREATE TABLE leasehold.lock_audit (
    id            BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    happened_at   TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    name          TEXT NOT NULL,
    released_by   TEXT NOT NULL,
    reason        TEXT NOT NULL,
    lock_id       UUID,
    operation     TEXT,
    locked_by     TEXT,
    acquired_at   TIMESTAMPTZ,
    expires_at    TIMESTAMPTZ,
    fencing_token BIGINT
);

-- What each process holds in sessions and transactions, where the server itself knows only a number. Never worth
-- a disk write: it is told again within a second.
CREATE UNLOGGED TABLE leasehold.presence (
    process_id  UUID NOT NULL,
    lock_id     UUID NOT NULL,
    name        TEXT NOT NULL,
    mode        TEXT NOT NULL,
    scope       TEXT NOT NULL,
    backend_pid INTEGER NOT NULL,
    operation   TEXT NOT NULL,
    locked_by   TEXT NOT NULL,
    instance    TEXT NOT NULL,
    metadata    JSONB NOT NULL,
    acquired_at TIMESTAMPTZ NOT NULL,
    seen_at     TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (process_id, lock_id)
);
CREATE INDEX presence_name ON leasehold.presence (name);
