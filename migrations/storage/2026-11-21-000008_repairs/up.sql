-- As before, but a tenant that is being removed gets no dead letter any more: its item is locked by the removal, so it
-- is among the changed ones, and its letters may have been removed already. Whoever has the item's row, as those have
-- that are unchanged, is waited for instead.
CREATE OR REPLACE FUNCTION leasehold.fail_work(
    ids BIGINT[], tokens UUID[], errors TEXT[], OUT done UUID[], OUT changed UUID[]
)
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    held CONSTANT RECORD := leasehold.lock_claims(ids, tokens);
BEGIN
    INSERT INTO leasehold.dead_letters
        (tenant_id, kind, scope_type, scope_id, payload, priority, event_at, max_attempts, attempt_count, last_error)
    SELECT i.tenant_id, i.kind, i.scope_type, i.scope_id, i.payload, i.priority, i.event_at, i.max_attempts,
           c.attempt_count, given.error
    FROM unnest(ids, tokens, errors) AS given(id, token, error)
    JOIN leasehold.work_claims c ON c.item_id = given.id AND c.token = given.token
    JOIN leasehold.work_items i ON i.id = c.item_id
    WHERE CASE WHEN c.item_id = ANY (held.unchanged) THEN true
               ELSE pg_try_advisory_xact_lock_shared(leasehold.tenant_write_key(i.tenant_id)) END
    ORDER BY c.item_id;
    DELETE FROM leasehold.work_items i WHERE i.id = ANY (held.unchanged);
    DELETE FROM leasehold.work_claims c WHERE c.item_id = ANY (held.unchanged || held.changed);
    done := held.unchanged_tokens;
    changed := held.changed_tokens;
END
$$;

-- Events are taken in their order.
CREATE INDEX outbox_order ON leasehold.outbox (tenant_id, seq);
DROP INDEX leasehold.outbox_tenant;
