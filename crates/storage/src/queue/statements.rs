//! The statements of the queue. What changes rows that others may work on is a function of the schema, where its plans
//! are kept in check; see `migrations/storage`.

/// Inserts in the order that it is given, which must be the same for everybody, or two enqueues may wait for each other.
pub(crate) const ENQUEUE: &str = "\
INSERT INTO leasehold.work_items AS w
    (tenant_id, kind, scope_type, scope_id, payload, priority, event_at, max_attempts)
SELECT n.tenant_id, n.kind, n.scope_type, n.scope_id, n.payload, n.priority,
       greatest(n.event_at, CASE WHEN n.is_now THEN clock_timestamp() END), n.max_attempts
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::jsonb[], $6::integer[], $7::timestamptz[],
            $8::boolean[], $9::integer[])
     WITH ORDINALITY
     AS n(tenant_id, kind, scope_type, scope_id, payload, priority, event_at, is_now, max_attempts, place)
ORDER BY n.place
ON CONFLICT ON CONSTRAINT work_items_one_a_scope DO UPDATE
SET generation = w.generation + 1, payload = excluded.payload, max_attempts = excluded.max_attempts,
    priority = least(w.priority, excluded.priority), event_at = greatest(w.event_at, excluded.event_at)";

/// A claim does not wait for the disk: one that a crash of the server forgets is only made again, as one that has expired
/// is, and what its holder still sends finds it gone. The end of a claim is durable, and so is all that was logged before
/// it. A dead letter that was told is there.
pub(crate) const CLAIM: &str = "\
WITH found AS MATERIALIZED (
    SELECT * FROM leasehold.claim_work($1, $2, $3, $4)
), relaxed AS MATERIALIZED (
    SELECT set_config('synchronous_commit', 'off', true) WHERE NOT EXISTS (SELECT FROM found WHERE token IS NULL)
)
SELECT id, token, tenant_id, kind, scope_type, scope_id, payload, priority, event_at, max_attempts, attempt_count,
       last_error, at, ends_at
FROM found LEFT JOIN relaxed ON true";

/// When the next item of these kinds may be claimed that cannot be now, as microseconds from now. For those who have
/// nothing to do.
pub(crate) const NEXT_DUE: &str = "\
SELECT (extract(epoch FROM min(c.expires_at) - clock_timestamp()) * 1000000)::bigint AS due_us
FROM leasehold.work_claims c JOIN leasehold.work_items i ON i.id = c.item_id
WHERE i.kind = ANY ($1::text[]) AND c.expires_at > clock_timestamp()";

pub(crate) const COMPLETE: &str = "SELECT done, changed FROM leasehold.complete_work($1, $2)";

pub(crate) const PUT_BACK: &str = "SELECT done, changed FROM leasehold.put_work_back($1, $2, $3, $4, $5)";

pub(crate) const FAIL: &str = "SELECT done, changed FROM leasehold.fail_work($1, $2, $3)";

/// Waits for those that are locked: `busy` is empty.
pub(crate) const EXTEND: &str =
    "SELECT extended AS done, busy AS changed FROM leasehold.extend_work($1, $2, $3, true)";

/// Waits for nobody.
pub(crate) const BEAT: &str = "SELECT extended, busy FROM leasehold.extend_work($1, $2, $3, false)";

pub(crate) const STATS: &str = "\
WITH live AS (
    SELECT i.kind,
           count(*) FILTER (WHERE c.expires_at > now.at AND c.token IS NOT NULL) AS claimed,
           count(*) FILTER (WHERE c.expires_at > now.at AND c.token IS NULL) AS delayed,
           count(*) FILTER (WHERE c.item_id IS NULL OR c.expires_at <= now.at) AS ready,
           greatest(
               max(extract(epoch FROM now.at - i.event_at)) FILTER (WHERE c.item_id IS NULL OR c.expires_at <= now.at),
               0
           ) AS age
    FROM (SELECT clock_timestamp() AS at) AS now
    CROSS JOIN leasehold.work_items i LEFT JOIN leasehold.work_claims c ON c.item_id = i.id
    GROUP BY i.kind
), dead AS (
    SELECT kind, count(*) AS dead FROM leasehold.dead_letters GROUP BY kind
)
SELECT kind, coalesce(ready, 0) AS ready, coalesce(delayed, 0) AS delayed, coalesce(claimed, 0) AS claimed,
       coalesce(dead, 0) AS dead, CASE WHEN ready > 0 THEN (age * 1000000)::bigint END AS oldest_us
FROM live FULL JOIN dead USING (kind)
ORDER BY kind";

macro_rules! items {
    ($whose:literal) => {
        concat!(
            "SELECT i.id, i.tenant_id, i.kind, i.scope_type, i.scope_id, i.payload, i.priority, i.event_at,
                    i.max_attempts, coalesce(c.attempt_count, 0) AS attempt_count, c.last_error, c.expires_at,
                    c.token IS NOT NULL AS claimed, coalesce(c.expires_at > clock_timestamp(), false) AS live
             FROM leasehold.work_items i LEFT JOIN leasehold.work_claims c ON c.item_id = i.id
             WHERE ",
            $whose,
            " AND ($2 IS NULL OR i.kind = $2) AND i.id > $3 ORDER BY i.id LIMIT $4"
        )
    };
}

pub(crate) const ITEMS: &str = items!("$1::text IS NULL");
pub(crate) const ITEMS_OF_TENANT: &str = items!("i.tenant_id = $1");

macro_rules! letters {
    ($whose:literal) => {
        concat!(
            "SELECT id, tenant_id, kind, scope_type, scope_id, payload, priority, event_at, max_attempts,
                    attempt_count, last_error, failed_at
             FROM leasehold.dead_letters WHERE ",
            $whose,
            " AND ($2 IS NULL OR kind = $2) AND id > $3 ORDER BY id LIMIT $4"
        )
    };
}

pub(crate) const LETTERS: &str = letters!("$1::text IS NULL");
pub(crate) const LETTERS_OF_TENANT: &str = letters!("tenant_id = $1");

/// Of several letters of one scope the last counts. A live item keeps what it has.
pub(crate) const REDRIVE: &str = "\
WITH letters AS (
    DELETE FROM leasehold.dead_letters WHERE id = ANY ($1::bigint[]) AND tenant_id = $2 RETURNING *
), latest AS (
    SELECT DISTINCT ON (kind, scope_type, scope_id) tenant_id, kind, scope_type, scope_id, payload, max_attempts,
           min(priority) OVER scope AS priority, max(event_at) OVER scope AS event_at
    FROM letters
    WINDOW scope AS (PARTITION BY kind, scope_type, scope_id)
    ORDER BY kind, scope_type, scope_id, id DESC
), merged AS (
    INSERT INTO leasehold.work_items AS w
        (tenant_id, kind, scope_type, scope_id, payload, priority, event_at, max_attempts)
    SELECT tenant_id, kind, scope_type, scope_id, payload, priority, event_at, max_attempts FROM latest
    ORDER BY tenant_id, kind, scope_type, scope_id
    ON CONFLICT ON CONSTRAINT work_items_one_a_scope DO UPDATE
    SET generation = w.generation + 1, priority = least(w.priority, excluded.priority),
        event_at = greatest(w.event_at, excluded.event_at)
)
SELECT count(*) AS number, coalesce(array_agg(DISTINCT kind), '{}') AS kinds FROM letters";

/// Oldest first, a thousand at a time, and none that somebody redrives just now.
pub(crate) const PURGE: &str = "\
DELETE FROM leasehold.dead_letters d USING (
    SELECT id FROM leasehold.dead_letters
    WHERE failed_at < clock_timestamp() - $1 * interval '1 microsecond'
       OR id <= (SELECT id FROM leasehold.dead_letters ORDER BY id DESC OFFSET $2 LIMIT 1)
    ORDER BY id LIMIT 1000 FOR UPDATE SKIP LOCKED
) AS doomed
WHERE d.id = doomed.id";

/// Claims whose item is gone: its tenant was removed.
pub(crate) const SWEEP: &str = "\
DELETE FROM leasehold.work_claims c USING (
    SELECT o.item_id FROM leasehold.work_claims o
    WHERE o.expires_at < clock_timestamp()
      AND NOT EXISTS (SELECT FROM leasehold.work_items i WHERE i.id = o.item_id)
    ORDER BY o.item_id LIMIT 1000 FOR UPDATE SKIP LOCKED
) AS orphan
WHERE c.item_id = orphan.item_id";
