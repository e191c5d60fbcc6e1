-- What changes the rows of the work queue. Everywhere the rows of work_items are locked first, by whoever can have them
-- at once (nothing here waits for one: a transaction that has enqueued may stay open for long), then those of
-- work_claims in the order of their ids.
--
-- These are functions because of their plans. A plan that was made for a table of three rows reads all of it, and is
-- kept when there are a million; what compiles plans (jit) takes a thousand times longer than they do. A function can
-- say that it wants neither.

-- Claims up to `batch` items of these kinds (each named once), for `lease_us` microseconds: by priority, time of the
-- event, and id. An item that was begun `max_attempts` times becomes a dead letter instead: such rows have no token.
CREATE FUNCTION leasehold.claim_work(kinds TEXT[], batch INTEGER, for_worker TEXT, lease_us BIGINT)
RETURNS TABLE (
    id BIGINT, token UUID, tenant_id TEXT, kind TEXT, scope_type TEXT, scope_id TEXT, payload JSONB, priority INTEGER,
    event_at TIMESTAMPTZ, max_attempts INTEGER, attempt_count INTEGER, last_error TEXT, at TIMESTAMPTZ,
    ends_at TIMESTAMPTZ
)
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    now_at CONSTANT TIMESTAMPTZ := clock_timestamp();
    ends   CONSTANT TIMESTAMPTZ := now_at + lease_us * interval '1 microsecond';
    chosen BIGINT[];
BEGIN
    -- What has waited for its time is in line again.
    UPDATE leasehold.work_items i SET parked_until = NULL
    FROM unnest(kinds) AS k(kind) CROSS JOIN LATERAL (
        SELECT p.id FROM leasehold.work_items p
        WHERE p.kind = k.kind AND p.parked_until <= now_at
        ORDER BY p.parked_until LIMIT 1000 FOR NO KEY UPDATE SKIP LOCKED
    ) AS due
    WHERE i.id = due.id;

    -- Others may have claimed what the look has found, before it could lock it; then it looks again.
    FOR look IN 1..5 LOOP
        -- Of each kind the first in line that nobody has. The inner limit is for the planner: it does not know `batch`.
        SELECT array_agg(first.id) INTO chosen
        FROM (
            SELECT head.id
            FROM unnest(kinds) AS k(kind) CROSS JOIN LATERAL (
                SELECT line.* FROM (
                    SELECT i.id, i.priority, i.event_at FROM leasehold.work_items i
                    WHERE i.kind = k.kind AND i.parked_until IS NULL
                      AND coalesce(
                          (SELECT c.expires_at FROM leasehold.work_claims c WHERE c.item_id = i.id), '-infinity'
                      ) <= now_at
                    ORDER BY i.priority, i.event_at, i.id
                    LIMIT 1000 FOR NO KEY UPDATE SKIP LOCKED
                ) AS line
                LIMIT batch
            ) AS head
            ORDER BY head.priority, head.event_at, head.id
            LIMIT batch
        ) AS first;
        IF chosen IS NULL THEN
            RETURN;
        END IF;

        -- This sees every claim of these items: claims are made only by those who have the item's row.
        RETURN QUERY
        WITH before AS MATERIALIZED (
            SELECT c.item_id, c.generation, c.attempt_count,
                   CASE WHEN c.token IS NULL THEN c.last_error ELSE 'not finished by ' || c.worker END AS last_error
            FROM leasehold.work_claims c
            WHERE c.item_id = ANY (chosen) AND c.expires_at <= now_at
            ORDER BY c.item_id FOR UPDATE SKIP LOCKED
        ), fresh AS (
            INSERT INTO leasehold.work_claims AS c
                (item_id, token, worker, claimed_at, expires_at, generation, attempt_count)
            SELECT i.id, gen_random_uuid(), for_worker, now_at, ends, i.generation, 1
            FROM leasehold.work_items i
            WHERE i.id = ANY (chosen)
              AND NOT EXISTS (SELECT FROM leasehold.work_claims c WHERE c.item_id = i.id)
            ON CONFLICT (item_id) DO NOTHING
            RETURNING c.item_id, c.token, c.attempt_count, c.last_error
        ), again AS (
            UPDATE leasehold.work_claims c
            SET token = gen_random_uuid(), worker = for_worker, claimed_at = now_at, expires_at = ends,
                generation = i.generation, attempt_count = b.attempt_count + 1, last_error = b.last_error
            FROM before b JOIN leasehold.work_items i ON i.id = b.item_id
            WHERE c.item_id = b.item_id AND b.attempt_count < i.max_attempts
            RETURNING c.item_id, c.token, c.attempt_count, c.last_error
        ), spent AS MATERIALIZED (
            SELECT i.*, b.attempt_count, coalesce(b.last_error, 'never finished') AS last_error,
                   b.generation = i.generation AS unchanged
            FROM before b JOIN leasehold.work_items i ON i.id = b.item_id
            WHERE b.attempt_count >= i.max_attempts
        ), dead AS (
            INSERT INTO leasehold.dead_letters AS d
                (tenant_id, kind, scope_type, scope_id, payload, priority, event_at, max_attempts, attempt_count,
                 last_error)
            SELECT s.tenant_id, s.kind, s.scope_type, s.scope_id, s.payload, s.priority, s.event_at, s.max_attempts,
                   s.attempt_count, s.last_error
            FROM spent s
            RETURNING d.*
        ), removed AS (
            DELETE FROM leasehold.work_items i USING spent s WHERE i.id = s.id AND s.unchanged
        ), forgotten AS (
            DELETE FROM leasehold.work_claims c USING spent s WHERE c.item_id = s.id
        )
        SELECT i.id, c.token, i.tenant_id, i.kind, i.scope_type, i.scope_id, i.payload, i.priority, i.event_at,
               i.max_attempts, c.attempt_count, c.last_error, now_at, ends
        FROM (SELECT * FROM fresh UNION ALL SELECT * FROM again) AS c JOIN leasehold.work_items i ON i.id = c.item_id
        UNION ALL
        SELECT d.id, NULL, d.tenant_id, d.kind, d.scope_type, d.scope_id, d.payload, d.priority, d.event_at,
               d.max_attempts, d.attempt_count, d.last_error, d.failed_at, NULL
        FROM dead d;
        EXIT WHEN FOUND;
    END LOOP;
END
$$;

-- Locks the claims among these that still are what they were, for those who end them. `unchanged` are the items that
-- are as they were claimed; one that somebody has locked may be about to change, and counts as changed. A call that
-- ends claims answers with their tokens.
CREATE FUNCTION leasehold.lock_claims(
    ids BIGINT[], tokens UUID[], OUT unchanged BIGINT[], OUT changed BIGINT[],
    OUT unchanged_tokens UUID[], OUT changed_tokens UUID[]
)
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    SELECT coalesce(array_agg(held.item_id) FILTER (WHERE held.same), '{}'),
           coalesce(array_agg(held.item_id) FILTER (WHERE held.there AND NOT held.same), '{}'),
           coalesce(array_agg(held.token) FILTER (WHERE held.same), '{}'),
           coalesce(array_agg(held.token) FILTER (WHERE held.there AND NOT held.same), '{}')
    INTO unchanged, changed, unchanged_tokens, changed_tokens
    FROM (
        SELECT c.item_id, c.token, i.generation IS NOT DISTINCT FROM c.generation AS same,
               EXISTS (SELECT FROM leasehold.work_items w WHERE w.id = c.item_id) AS there
        FROM unnest(ids, tokens) AS given(id, token)
        JOIN leasehold.work_claims c ON c.item_id = given.id AND c.token = given.token
        LEFT JOIN LATERAL (
            SELECT w.generation FROM leasehold.work_items w WHERE w.id = c.item_id FOR UPDATE SKIP LOCKED
        ) AS i ON true
        ORDER BY c.item_id FOR UPDATE OF c
    ) AS held;
END
$$;

-- Ends claims whose work is done. A changed item stays, to be claimed again.
CREATE FUNCTION leasehold.complete_work(ids BIGINT[], tokens UUID[], OUT done UUID[], OUT changed UUID[])
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    held CONSTANT RECORD := leasehold.lock_claims(ids, tokens);
BEGIN
    DELETE FROM leasehold.work_items i WHERE i.id = ANY (held.unchanged);
    DELETE FROM leasehold.work_claims c WHERE c.item_id = ANY (held.unchanged || held.changed);
    done := held.unchanged_tokens;
    changed := held.changed_tokens;
END
$$;

-- Ends claims whose work is to be tried again, each after its delay in microseconds. An error that is NULL leaves the
-- last one; with `uncounted` the attempt does not count. A changed item can be claimed at once, as a new one.
CREATE FUNCTION leasehold.put_work_back(
    ids BIGINT[], tokens UUID[], delays_us BIGINT[], errors TEXT[], uncounted BOOLEAN,
    OUT done UUID[], OUT changed UUID[]
)
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    held   CONSTANT RECORD := leasehold.lock_claims(ids, tokens);
    now_at CONSTANT TIMESTAMPTZ := clock_timestamp();
BEGIN
    DELETE FROM leasehold.work_claims c WHERE c.item_id = ANY (held.changed);
    UPDATE leasehold.work_claims c
    SET token = NULL, worker = NULL, claimed_at = NULL,
        expires_at = now_at + given.delay_us * interval '1 microsecond',
        attempt_count = c.attempt_count - uncounted::integer,
        last_error = coalesce(given.error, c.last_error)
    FROM unnest(ids, tokens, delays_us, errors) AS given(id, token, delay_us, error)
    WHERE c.item_id = given.id AND c.token = given.token;
    UPDATE leasehold.work_items i SET parked_until = c.expires_at
    FROM leasehold.work_claims c
    WHERE c.item_id = ANY (held.unchanged) AND c.expires_at > now_at AND i.id = c.item_id;
    done := held.unchanged_tokens;
    changed := held.changed_tokens;
END
$$;

-- Ends claims whose work is given up: a dead letter for each. A changed item stays, to be claimed as a new one.
CREATE FUNCTION leasehold.fail_work(
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
    ORDER BY c.item_id;
    DELETE FROM leasehold.work_items i WHERE i.id = ANY (held.unchanged);
    DELETE FROM leasehold.work_claims c WHERE c.item_id = ANY (held.unchanged || held.changed);
    done := held.unchanged_tokens;
    changed := held.changed_tokens;
END
$$;

-- Moves the end of claims to `lease_us` microseconds from now, if that is later. With `wait` it waits for those that
-- somebody has locked just now; without, they are `busy`, and stay as they are.
CREATE FUNCTION leasehold.extend_work(
    ids BIGINT[], tokens UUID[], lease_us BIGINT, wait BOOLEAN, OUT extended UUID[], OUT busy UUID[]
)
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    held BIGINT[];
BEGIN
    busy := '{}';
    IF wait THEN
        SELECT array_agg(c.item_id), coalesce(array_agg(c.token), '{}') INTO held, extended FROM (
            SELECT c.item_id, c.token FROM unnest(ids, tokens) AS given(id, token)
            JOIN leasehold.work_claims c ON c.item_id = given.id AND c.token = given.token
            WHERE EXISTS (SELECT FROM leasehold.work_items i WHERE i.id = c.item_id)
            ORDER BY c.item_id FOR UPDATE OF c
        ) AS c;
    ELSE
        SELECT array_agg(c.item_id), coalesce(array_agg(c.token), '{}') INTO held, extended FROM (
            SELECT c.item_id, c.token FROM unnest(ids, tokens) AS given(id, token)
            JOIN leasehold.work_claims c ON c.item_id = given.id AND c.token = given.token
            WHERE EXISTS (SELECT FROM leasehold.work_items i WHERE i.id = c.item_id)
            ORDER BY c.item_id FOR UPDATE OF c SKIP LOCKED
        ) AS c;
        IF cardinality(extended) < cardinality(tokens) THEN
            SELECT coalesce(array_agg(c.token), '{}') INTO busy
            FROM unnest(ids, tokens) AS given(id, token)
            JOIN leasehold.work_claims c ON c.item_id = given.id AND c.token = given.token
            WHERE c.token <> ALL (extended)
              AND EXISTS (SELECT FROM leasehold.work_items i WHERE i.id = c.item_id);
        END IF;
    END IF;
    UPDATE leasehold.work_claims c
    SET expires_at = greatest(c.expires_at, clock_timestamp() + lease_us * interval '1 microsecond')
    WHERE c.item_id = ANY (held);
END
$$;
