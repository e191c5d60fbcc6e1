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
        -- A timeout may race with the grant: whether it is ours is for the server to say.
        SELECT CASE
                   WHEN bool_or(pid = pg_backend_pid()) THEN 'drained'
                   WHEN count(*) > 0 THEN 'purge_in_progress'
                   ELSE 'writes_in_progress'
               END
        INTO outcome
        FROM pg_locks
        WHERE locktype = 'advisory' AND granted AND mode = 'ExclusiveLock' AND objsubid = 1
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND (classid::bigint << 32) | objid::bigint = gate;
    END;
    PERFORM set_config('lock_timeout', previous, true);
    RETURN outcome;
END
$$;

-- Refuses a write whose tenant is being drained; see leasehold.gate_table.
CREATE FUNCTION leasehold.refuse_write() RETURNS TRIGGER
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the tenant takes no writes: its data is being removed'
        USING ERRCODE = 'lock_not_available',
              TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
              HINT = 'Write again when the removal is over.';
END
$$;

-- Makes every write of a table take the gate of its row's tenant, whoever writes: a program that knows nothing of the
-- gate waits for nobody either, but a drain waits for it, and it is refused while a drain has the tenant or waits.
-- `watched` are the columns whose change is a write of the tenant: all of them when it is NULL.
CREATE FUNCTION leasehold.gate_table(target REGCLASS, tenant_column NAME, watched NAME[] DEFAULT NULL) RETURNS VOID
LANGUAGE plpgsql AS $$
DECLARE
    -- Written out, because a function in SQL would be planned again by each statement.
    refused CONSTANT TEXT := 'NOT pg_try_advisory_xact_lock_shared(hashtextextended('
        || '''tenant_write|'' || octet_length(%1$s)::text || '':'' || %1$s, 0))';
    changed TEXT := 'UPDATE';
BEGIN
    IF watched IS NOT NULL THEN
        changed := 'UPDATE OF ' || (SELECT string_agg(quote_ident(name), ', ') FROM unnest(watched) AS name);
    END IF;
    EXECUTE format(
        'CREATE TRIGGER leasehold_gate_insert BEFORE INSERT ON %s FOR EACH ROW WHEN (%s) '
            || 'EXECUTE FUNCTION leasehold.refuse_write()',
        target, format(refused, 'NEW.' || quote_ident(tenant_column)));
    EXECUTE format(
        'CREATE TRIGGER leasehold_gate_update BEFORE %s ON %s FOR EACH ROW WHEN (%s OR %s) '
            || 'EXECUTE FUNCTION leasehold.refuse_write()',
        changed, target,
        format(refused, 'OLD.' || quote_ident(tenant_column)), format(refused, 'NEW.' || quote_ident(tenant_column)));
    EXECUTE format(
        'CREATE TRIGGER leasehold_gate_delete BEFORE DELETE ON %s FOR EACH ROW WHEN (%s) '
            || 'EXECUTE FUNCTION leasehold.refuse_write()',
        target, format(refused, 'OLD.' || quote_ident(tenant_column)));
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
