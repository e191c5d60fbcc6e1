-- The key of a tenant's write gate. Other programs compute it too: it never changes.
CREATE FUNCTION leasehold.tenant_write_key(tenant TEXT) RETURNS BIGINT
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT hashtextextended('tenant_write|' || octet_length(tenant)::text || ':' || tenant, 0)
$$;

-- Takes a tenant's gate for the transaction, and waits for those who have it up to `timeout_ms`, which bounds this
-- wait alone. Answers `drained`, `writes_in_progress` or `purge_in_progress`.
CREATE FUNCTION leasehold.drain_tenant(tenant TEXT, timeout_ms INTEGER) RETURNS TEXT
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    gate     CONSTANT BIGINT := leasehold.tenant_write_key(tenant);
    previous CONSTANT TEXT := current_setting('lock_timeout');
    outcome  TEXT;
BEGIN
    -- One drain of a tenant at a time, so that none of them waits for another.
    IF NOT pg_try_advisory_xact_lock(
        hashtextextended('tenant_drain|' || octet_length(tenant)::text || ':' || tenant, 0)
    ) THEN
        RETURN 'purge_in_progress';
    END IF;
    BEGIN
        PERFORM set_config('lock_timeout', timeout_ms::text || 'ms', true);
        PERFORM pg_advisory_xact_lock(gate);
        outcome := 'drained';
    -- A statement_timeout that is shorter strikes first, as the other of the two.
    EXCEPTION WHEN lock_not_available OR query_canceled THEN
        -- Whatever was granted in the same moment is given back with this block, so a refusal leaves nothing. Whether
        -- the gate is free by now is for the server to say.
        outcome := CASE
            WHEN pg_try_advisory_xact_lock(gate) THEN 'drained'
            WHEN EXISTS (
                SELECT FROM pg_locks
                WHERE locktype = 'advisory' AND granted AND mode = 'ExclusiveLock' AND objsubid = 1
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  AND (classid::bigint << 32) | objid::bigint = gate
            ) THEN 'purge_in_progress'
            ELSE 'writes_in_progress'
        END;
    END;
    PERFORM set_config('lock_timeout', previous, true);
    RETURN outcome;
END
$$;

-- Makes every write of a table take the gate of its row's tenant before anything else, whoever writes: a program that
-- knows nothing of the gate waits for nobody either, but a drain waits for it, and it is refused while a drain has the
-- tenant or waits. A row that moves takes two. TRUNCATE has no rows and passes.
-- `watched` are the columns whose change is a write of the tenant: all of them when it is NULL.
CREATE FUNCTION leasehold.gate_table(target REGCLASS, tenant_column NAME, watched NAME[] DEFAULT NULL) RETURNS VOID
LANGUAGE plpgsql AS $$
DECLARE
    changed TEXT := 'UPDATE';
    -- The key is written out for roles that may not use the schema leasehold.
    closed CONSTANT TEXT := format(
        'NOT pg_try_advisory_xact_lock_shared(hashtextextended('
            || '''tenant_write|'' || octet_length(%1$s) || '':'' || %1$s, 0))',
        '%1$s.' || quote_ident(tenant_column));
    gate CONSTANT TEXT := format('leasehold.%I', 'gate_by_' || tenant_column);
BEGIN
    IF watched IS NOT NULL THEN
        SELECT 'UPDATE OF ' || string_agg(quote_ident(name), ', ') INTO changed
        FROM (SELECT tenant_column UNION SELECT unnest(watched)) AS columns (name);
    END IF;
    -- One for all tables whose column is called so. As the condition of a trigger the same would be parsed and planned
    -- again by each statement. Of OLD and NEW, the one that there is none of is NULL.
    EXECUTE format(
        $gate$
        CREATE OR REPLACE FUNCTION %s() RETURNS TRIGGER
        LANGUAGE plpgsql AS $body$
        BEGIN
            IF %s OR %s THEN
                RAISE EXCEPTION 'the tenant takes no writes: its data is being removed'
                    USING ERRCODE = 'lock_not_available',
                          TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                          HINT = 'Write again when the removal is over.';
            END IF;
            IF TG_OP = 'DELETE' THEN
                RETURN OLD;
            END IF;
            RETURN NEW;
        END
        $body$
        $gate$,
        gate, format(closed, 'NEW'), format(closed, 'OLD'));
    EXECUTE format(
        'CREATE TRIGGER leasehold_gate BEFORE INSERT OR DELETE OR %s ON %s FOR EACH ROW EXECUTE FUNCTION %s()',
        changed, target, gate);
END
$$;

-- Events, written by the transactions that they tell of, until they are handed on. They are handed on in the order of
-- `seq`, which is not quite the order of the commits.
CREATE TABLE leasehold.outbox (
    seq        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id         UUID NOT NULL DEFAULT gen_random_uuid(),
    tenant_id  TEXT COLLATE "C" NOT NULL,
    type       TEXT NOT NULL,
    data       JSONB NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX outbox_tenant ON leasehold.outbox (tenant_id);
