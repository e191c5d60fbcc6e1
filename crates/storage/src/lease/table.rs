//! [`LeaseTable`]: where lease rows live, and the statements on them.
//!
//! Every statement tells its outcome by itself, uses the database's `clock_timestamp()` (never `now()`, which
//! stands still in a transaction), and matches the lock id of the acquisition that it is about.

use leasehold_domain::{Invalid, LockName};
use uuid::Uuid;

/// The columns of a lease in a table of the caller.
///
/// The types must be: `id UUID`, `operation TEXT`, `by TEXT`, `acquired_at` and `expires_at TIMESTAMPTZ`, all
/// nullable, and `fencing_token BIGINT NOT NULL DEFAULT 0`. A `CHECK (num_nulls(…) IN (0, 5))` over the first
/// five keeps a half-held row impossible.
#[derive(Clone, Debug)]
pub struct LeaseColumns {
    /// The acquisition.
    pub id: String,
    /// What the holder does.
    pub operation: String,
    /// Who the holder is.
    pub by: String,
    /// When it was acquired.
    pub acquired_at: String,
    /// When it ends unless renewed.
    pub expires_at: String,
    /// The token of the last acquisition.
    pub fencing_token: String,
}

impl LeaseColumns {
    /// Six columns that share a prefix: `<prefix>id`, `<prefix>operation`, `<prefix>by` and so on.
    pub fn prefixed(prefix: &str) -> Self {
        let column = |suffix| format!("{prefix}{suffix}");
        Self {
            id: column("id"),
            operation: column("operation"),
            by: column("by"),
            acquired_at: column("acquired_at"),
            expires_at: column("expires_at"),
            fencing_token: column("fencing_token"),
        }
    }
}

/// Describes a table of the caller whose rows can be leased.
///
/// A lock name is a fixed first part, which tells the table from others, followed by one part for each key
/// column. Key columns must be unique together, and of a type that the builder is told: it compares with the column's
/// own index. A part that is no value of its column's type is refused as [`Invalid`], and so is one that Postgres would
/// write in another way (`007`, a UUID in capitals): a row has one name.
///
/// ```
/// use leasehold_storage::{LeaseColumns, RowLeaseTable};
///
/// let plans = RowLeaseTable::new("public", "plans", "plan")
///     .key_column("tenant_id")
///     .key_column("id")
///     .columns(LeaseColumns::prefixed("lock_"))
///     .build()?;
/// # Ok::<(), leasehold_domain::Invalid>(())
/// ```
#[derive(Clone, Debug)]
pub struct RowLeaseTable {
    schema: String,
    table: String,
    fixed_part: String,
    keys: Vec<(String, KeyType)>,
    columns: LeaseColumns,
}

/// The type of a key column, whose values are parts of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeyType {
    Text,
    Uuid,
    /// Of any width: Postgres compares them with each other by index.
    Integer,
}

impl KeyType {
    /// Makes a value of the type of a text, or an array of an array.
    fn cast(self, bind: &str, array: &str) -> String {
        match self {
            Self::Text => bind.to_owned(),
            Self::Uuid => format!("{bind}::uuid{array}"),
            Self::Integer => format!("{bind}::bigint{array}"),
        }
    }

    fn check(self, part: &str) -> Result<(), Invalid> {
        let (written, wanted) = match self {
            Self::Text => return Ok(()),
            Self::Uuid => (Uuid::parse_str(part).map(|id| id.to_string()).ok(), "a UUID"),
            Self::Integer => (part.parse::<i64>().map(|id| id.to_string()).ok(), "an integer"),
        };
        if written.as_deref() == Some(part) {
            return Ok(());
        }
        Err(Invalid::new(
            "name",
            format!("{part:?} is not {wanted} as Postgres writes it"),
        ))
    }
}

impl RowLeaseTable {
    /// A table, the first part of its lock names, and columns with the prefix `lock_`.
    pub fn new(schema: &str, table: &str, fixed_part: &str) -> Self {
        Self {
            schema: schema.into(),
            table: table.into(),
            fixed_part: fixed_part.into(),
            keys: Vec::new(),
            columns: LeaseColumns::prefixed("lock_"),
        }
    }

    /// Adds a key column of type TEXT or VARCHAR, or of a domain over them: the next part of the name is its value.
    #[must_use]
    pub fn key_column(self, column: &str) -> Self {
        self.key_of(column, KeyType::Text)
    }

    /// Adds a key column of type UUID: the next part of the name is its value, in the form
    /// `67e55044-10b1-426f-9247-bb680e5fe0c8`.
    #[must_use]
    pub fn uuid_key_column(self, column: &str) -> Self {
        self.key_of(column, KeyType::Uuid)
    }

    /// Adds a key column of type BIGINT, INTEGER or SMALLINT: the next part of the name is its value in decimal.
    #[must_use]
    pub fn integer_key_column(self, column: &str) -> Self {
        self.key_of(column, KeyType::Integer)
    }

    fn key_of(mut self, column: &str, key_type: KeyType) -> Self {
        self.keys.push((column.into(), key_type));
        self
    }

    /// Names the lease columns.
    #[must_use]
    pub fn columns(mut self, columns: LeaseColumns) -> Self {
        self.columns = columns;
        self
    }

    /// Checks and quotes every identifier and writes the statements, once.
    ///
    /// # Errors
    /// [`Invalid`] with the field `table` when an identifier is empty, longer than the 63 bytes that Postgres
    /// keeps, or contains NUL, or when there is no key column.
    pub fn build(self) -> Result<LeaseTable, Invalid> {
        if self.keys.is_empty() {
            return Err(Invalid::new(
                "table",
                "a lease table needs at least one key column",
            ));
        }
        let columns = Columns {
            id: quote(&self.columns.id)?,
            operation: quote(&self.columns.operation)?,
            by: quote(&self.columns.by)?,
            acquired_at: quote(&self.columns.acquired_at)?,
            expires_at: quote(&self.columns.expires_at)?,
            token: quote(&self.columns.fencing_token)?,
            keys: self
                .keys
                .iter()
                .map(|(key, key_type)| Ok((quote(key)?, *key_type)))
                .collect::<Result<_, _>>()?,
        };
        let table = format!("{}.{}", quote(&self.schema)?, quote(&self.table)?);
        Ok(LeaseTable::write(
            Naming::Parts {
                fixed: self.fixed_part,
            },
            &table,
            &columns,
            false,
        ))
    }
}

/// A quoted identifier, which keeps its case and may be any word.
fn quote(identifier: &str) -> Result<String, Invalid> {
    if identifier.is_empty() || identifier.len() > 63 || identifier.contains('\0') {
        return Err(Invalid::new(
            "table",
            format!("{identifier:?} cannot be an identifier (1 to 63 bytes, no NUL)"),
        ));
    }
    Ok(format!("\"{}\"", identifier.replace('"', "\"\"")))
}

struct Columns {
    id: String,
    operation: String,
    by: String,
    acquired_at: String,
    expires_at: String,
    token: String,
    keys: Vec<(String, KeyType)>,
}

/// How a lock name becomes the values of the key columns.
#[derive(Debug)]
enum Naming {
    /// One column with the encoded name.
    Encoded,
    /// A fixed first part, then one column a part.
    Parts { fixed: String },
}

/// A table of leases with its statements. It is made by [`RowLeaseTable::build`].
#[derive(Debug)]
pub struct LeaseTable {
    naming: Naming,
    keys: Vec<KeyType>,
    /// Whether the table is the library's own: rows are made as they are needed and tell more of the holder.
    pub(crate) own: bool,
    /// Binds: lock id, operation, by, ttl in seconds; the key values; for the own table also instance, metadata
    /// and the advisory key of the name's first row.
    pub(crate) acquire: String,
    /// As `acquire`, without waiting for the disk.
    pub(crate) acquire_with_write: String,
    /// Binds: lock id; the key values. A row with `live`.
    pub(crate) release: String,
    /// As `release`, for the background: waits for no row lock. A row that says whether it `ended` something, and
    /// whether the lease was `there`.
    pub(crate) give_back: String,
    /// Binds: lock id, ttl and longest hold in seconds; the key values. A row with the new `expires_at`,
    /// `acquired_at`, `fencing_token` and `age` in seconds.
    pub(crate) extend: String,
    /// Binds: arrays of lock ids, ttls, longest holds; whether the disk may wait; one array a key column. A row
    /// for each with `expires_at`, null when it was not renewed, and `live`.
    pub(crate) renew: String,
    /// Binds: lock id; the key values. A row with the token and the transaction's id.
    pub(crate) fence: String,
    /// As `fence`, and releases.
    pub(crate) fence_and_release: String,
    /// Binds: the key values. The live holder's row.
    pub(crate) inspect: String,
    /// Binds: audited name, who, reason; the key values. The row it ended.
    pub(crate) force_release: String,
    /// Part of a statement: every live holder's row. `{fixed}` stands for the bind of the encoded fixed part.
    pub(crate) held: String,
}

impl LeaseTable {
    /// `leasehold.leases`.
    pub(crate) fn own() -> Self {
        let column = |name: &str| format!("\"{name}\"");
        let columns = Columns {
            id: column("lock_id"),
            operation: column("operation"),
            by: column("locked_by"),
            acquired_at: column("acquired_at"),
            expires_at: column("expires_at"),
            token: column("fencing_token"),
            keys: vec![(column("name"), KeyType::Text)],
        };
        Self::write(Naming::Encoded, "leasehold.leases", &columns, true)
    }

    /// `leasehold.jobs`: the run of a job is a lease in the job's row.
    pub(crate) fn jobs() -> Self {
        let column = |name: &str| format!("\"{name}\"");
        let columns = Columns {
            id: column("run_id"),
            operation: column("run_operation"),
            by: column("run_by"),
            acquired_at: column("run_acquired_at"),
            expires_at: column("run_expires_at"),
            token: column("run_fencing_token"),
            keys: vec![(column("name"), KeyType::Text)],
        };
        let fixed = crate::jobs::FIXED_PART.to_owned();
        Self::write(Naming::Parts { fixed }, "leasehold.jobs", &columns, false)
    }

    /// How the encoded names of this table's locks begin; `None` for the library's own, whose rows have whole names.
    pub(crate) fn fixed_part(&self) -> Option<String> {
        match &self.naming {
            Naming::Encoded => None,
            Naming::Parts { fixed } => Some(format!("|{}:{fixed}", fixed.len())),
        }
    }

    /// The values of the key columns for a name, in their order, as texts that the statements can cast.
    ///
    /// # Errors
    /// [`Invalid`] with the field `name` when the name is not one of this table's.
    pub(crate) fn key_values(&self, name: &LockName) -> Result<Vec<String>, Invalid> {
        match &self.naming {
            Naming::Encoded => Ok(vec![name.encoded().to_owned()]),
            Naming::Parts { fixed } => {
                let mut parts = name.parts();
                let first = parts.next();
                let values: Vec<String> = parts.map(str::to_owned).collect();
                let keys = self.keys.len();
                if first != Some(fixed) || values.len() != keys {
                    return Err(Invalid::new(
                        "name",
                        format!("a lock of this table is named {fixed:?} and {keys} more parts"),
                    ));
                }
                for (key_type, value) in self.keys.iter().zip(&values) {
                    key_type.check(value)?;
                }
                Ok(values)
            }
        }
    }
}

impl LeaseTable {
    fn write(naming: Naming, table: &str, columns: &Columns, own: bool) -> Self {
        let fill = |template: &str| columns.fill(table, template);
        let (more, made) = if own { (OWN_SET, OWN_INSERT) } else { ("", "") };
        let from = if own {
            "(TABLE taken UNION ALL TABLE made)"
        } else {
            "taken"
        };
        let told = if own {
            "instance, metadata"
        } else {
            "NULL::text AS instance, NULL::jsonb AS metadata"
        };
        let (kind, name) = if own {
            ("lease", "t.name")
        } else {
            ("row_lease", "{fixed} || {parts}")
        };
        let acquire = |commit| {
            let template = ACQUIRE
                .replace("{more}", more)
                .replace("{made}", made)
                .replace("{from}", from);
            fill(&template.replace("{commit}", commit).replace("{told}", told))
        };
        Self {
            naming,
            keys: columns.keys.iter().map(|(_, key_type)| *key_type).collect(),
            own,
            acquire: acquire("NULL::text"),
            acquire_with_write: acquire(
                "CASE WHEN given.fencing_token IS NOT NULL THEN set_config('synchronous_commit', 'off', true) END",
            ),
            release: fill(RELEASE),
            give_back: fill(GIVE_BACK),
            extend: fill(EXTEND),
            renew: fill(RENEW),
            fence: fill(&FENCE.replace("{set}", "{expires_at} = t.{expires_at}")),
            fence_and_release: fill(&FENCE.replace("{set}", "{clear}")),
            inspect: fill(&INSPECT.replace("{told}", told)),
            force_release: fill(&FORCE_RELEASE.replace("{told}", told)),
            held: fill(
                &HELD
                    .replace("{told}", told)
                    .replace("{kind}", kind)
                    .replace("{name}", name),
            ),
        }
    }
}

impl Columns {
    /// Puts identifiers into a template. `{match N}` compares the key columns with the binds from `$N` on, `{keys}`
    /// selects them from `t` under names that no other column has, and `{same A}` compares those of `t` with what
    /// was so selected in `A`; `{unnest N}` and `{unnested}` take the keys as arrays.
    fn fill(&self, table: &str, template: &str) -> String {
        let list = |write: &dyn Fn(usize, &String, KeyType) -> String, separator: &str| {
            self.keys
                .iter()
                .enumerate()
                .map(|(index, (key, key_type))| write(index, key, *key_type))
                .collect::<Vec<_>>()
                .join(separator)
        };
        let mut text = template.replace("{clear}", CLEAR).replace("{table}", table);
        for (field, column) in [
            ("{id}", &self.id),
            ("{operation}", &self.operation),
            ("{by}", &self.by),
            ("{acquired_at}", &self.acquired_at),
            ("{expires_at}", &self.expires_at),
            ("{token}", &self.token),
        ] {
            text = text.replace(field, column);
        }
        text = text.replace(
            "{keys}",
            &list(&|index, key, _| format!("t.{key} AS key{index}"), ", "),
        );
        let part = |_, key: &String, _| {
            format!("'|' || octet_length(convert_to(t.{key}::text, 'UTF8')) || ':' || t.{key}::text")
        };
        text = text.replace("{parts}", &list(&part, " || "));
        text = text.replace("{unnested}", &list(&|index, _, _| format!("key{index}"), ", "));
        for first in 1..10 {
            let matched = list(
                &|index, key, key_type| {
                    let value = key_type.cast(&format!("${}", first + index), "");
                    format!("t.{key} = {value}")
                },
                " AND ",
            );
            text = text.replace(&format!("{{match {first}}}"), &matched);
            let arrays = list(
                &|index, _, key_type| key_type.cast(&format!("${}::text[]", first + index), "[]"),
                ", ",
            );
            text = text.replace(&format!("{{unnest {first}}}"), &arrays);
        }
        for other in ["open", "mine", "due"] {
            let same = list(&|index, key, _| format!("t.{key} = {other}.key{index}"), " AND ");
            text = text.replace(&format!("{{same {other}}}"), &same);
        }
        text
    }
}

/// No row lock is ever waited for: a row that somebody has locked is skipped, and the caller looks again. What
/// was `open` is checked again by Postgres on the newest version of the row before the row is locked.
const ACQUIRE: &str = "\
WITH seen AS MATERIALIZED (
    SELECT {id} AS lock_id, {operation} AS operation, {by} AS locked_by, {told}, {acquired_at} AS acquired_at,
           {expires_at} AS expires_at, {token} AS fencing_token,
           coalesce({expires_at} > clock_timestamp(), false) AS live
    FROM {table} AS t WHERE {match 5}
), open AS MATERIALIZED (
    SELECT {keys} FROM {table} AS t
    WHERE {match 5} AND ({id} IS NULL OR {expires_at} <= clock_timestamp() OR {id} = $1)
    FOR NO KEY UPDATE SKIP LOCKED
), taken AS (
    UPDATE {table} AS t
    SET {id} = $1, {operation} = $2, {by} = $3, {acquired_at} = at.now,
        {expires_at} = at.now + $4 * interval '1 second', {token} = leasehold.next_token(t.{token}){more}
    FROM open, (SELECT clock_timestamp() AS now) AS at
    WHERE {same open}
    RETURNING t.{acquired_at} AS acquired_at, t.{expires_at} AS expires_at, t.{token} AS fencing_token
){made}
SELECT given.acquired_at AS given_at, given.expires_at AS given_until, given.fencing_token AS given_token,
       seen.live, seen.lock_id, seen.operation, seen.locked_by, seen.instance, seen.metadata, seen.acquired_at,
       seen.expires_at, seen.fencing_token,
       extract(epoch FROM seen.expires_at - clock_timestamp())::float8 AS ends_in, {commit} AS commit
FROM (SELECT) AS one LEFT JOIN seen ON true LEFT JOIN {from} AS given ON true";

const OWN_SET: &str = ", instance = $6, metadata = $7, used_at = at.now";

/// An insert waits for another one of the same key, so only who gets the advisory lock makes the row.
const OWN_INSERT: &str = ", made AS (
    INSERT INTO leasehold.leases AS made
           (name, lock_id, operation, locked_by, instance, metadata, acquired_at, expires_at, fencing_token, used_at)
    SELECT $5, $1, $2, $3, $6, $7, at.now, at.now + $4 * interval '1 second', leasehold.next_token(0), at.now
    FROM (SELECT clock_timestamp() AS now) AS at
    WHERE CASE WHEN EXISTS (SELECT FROM seen) THEN false ELSE pg_try_advisory_xact_lock($8) END
    ON CONFLICT (name) DO NOTHING
    RETURNING made.acquired_at, made.expires_at, made.fencing_token
)";

const CLEAR: &str = "{id} = NULL, {operation} = NULL, {by} = NULL, {acquired_at} = NULL, {expires_at} = NULL";

/// The end of a hold need not reach the disk: after a crash it ends by itself.
const RELEASE: &str = "\
WITH mine AS MATERIALIZED (
    SELECT {keys}, {expires_at} AS until FROM {table} AS t WHERE {match 2} AND {id} = $1 FOR NO KEY UPDATE
)
UPDATE {table} AS t
SET {clear}
FROM mine WHERE {same mine}
RETURNING mine.until > clock_timestamp() AS live, set_config('synchronous_commit', 'off', true) AS commit";

/// Many of these go over one connection: one that waited would keep the others waiting.
const GIVE_BACK: &str = "\
WITH there AS MATERIALIZED (
    SELECT FROM {table} AS t WHERE {match 2} AND {id} = $1
), mine AS MATERIALIZED (
    SELECT {keys} FROM {table} AS t WHERE {match 2} AND {id} = $1 FOR NO KEY UPDATE SKIP LOCKED
), ended AS (
    UPDATE {table} AS t SET {clear}
    FROM mine WHERE {same mine}
    RETURNING set_config('synchronous_commit', 'off', true) AS commit
)
SELECT (SELECT count(commit) FROM ended) > 0 AS ended, EXISTS (SELECT FROM there) AS there";

/// The expiry is looked at after the row is locked: a wait for the row must not revive what expired meanwhile.
const EXTEND: &str = "\
WITH mine AS MATERIALIZED (
    SELECT {keys}, {expires_at} AS until FROM {table} AS t WHERE {match 4} AND {id} = $1 FOR NO KEY UPDATE
)
UPDATE {table} AS t
SET {expires_at} = greatest(t.{expires_at}, least(clock_timestamp() + $2 * interval '1 second',
                                                  t.{acquired_at} + $3 * interval '1 second'))
FROM mine WHERE {same mine} AND mine.until > clock_timestamp()
RETURNING t.{expires_at} AS expires_at, t.{acquired_at} AS acquired_at, t.{token} AS fencing_token,
          extract(epoch FROM clock_timestamp() - t.{acquired_at})::float8 AS age";

const RENEW: &str = "\
WITH due AS MATERIALIZED (
    SELECT * FROM unnest($1::uuid[], $2::float8[], $3::float8[], {unnest 5}) AS d(lock_id, ttl, max_hold, {unnested})
), ours AS MATERIALIZED (
    SELECT due.lock_id, t.{expires_at} > clock_timestamp() AS live
    FROM due JOIN {table} AS t ON {same due} AND t.{id} = due.lock_id
), open AS MATERIALIZED (
    SELECT {keys}, due.ttl, due.max_hold, t.{expires_at} AS until
    FROM due JOIN {table} AS t ON {same due} AND t.{id} = due.lock_id
    WHERE t.{expires_at} > clock_timestamp()
    FOR NO KEY UPDATE OF t SKIP LOCKED
), renewed AS (
    UPDATE {table} AS t
    SET {expires_at} = greatest(t.{expires_at}, least(clock_timestamp() + open.ttl * interval '1 second',
                                                      t.{acquired_at} + open.max_hold * interval '1 second'))
    FROM open WHERE {same open} AND open.until > clock_timestamp()
    RETURNING t.{id} AS lock_id, t.{expires_at} AS expires_at
)
SELECT due.lock_id, renewed.expires_at, coalesce(ours.live, false) AS live,
       CASE WHEN $4 THEN set_config('synchronous_commit', 'off', true) END AS commit
FROM due LEFT JOIN ours USING (lock_id) LEFT JOIN renewed USING (lock_id)";

const FENCE: &str = "\
WITH mine AS MATERIALIZED (
    SELECT {keys}, {expires_at} AS until FROM {table} AS t WHERE {match 2} AND {id} = $1 FOR NO KEY UPDATE
)
UPDATE {table} AS t SET {set}
FROM mine WHERE {same mine} AND mine.until > clock_timestamp()
RETURNING t.{token} AS fencing_token, pg_current_xact_id()::text AS transaction";

const INSPECT: &str = "\
SELECT {id} AS lock_id, {operation} AS operation, {by} AS locked_by, {told}, {acquired_at} AS acquired_at,
       {expires_at} AS expires_at, {token} AS fencing_token
FROM {table} AS t WHERE {match 1} AND {expires_at} > clock_timestamp()";

/// The columns are those of every kind of lock.
const HELD: &str = "\
SELECT '{kind}', {name}, NULL, NULL, 'exclusive', {id}, {operation}, {by}, {told}, {acquired_at},
           {expires_at}, {token}, NULL, NULL, NULL, '{kind}' || {name}
    FROM {table} AS t WHERE {expires_at} > clock_timestamp()";

/// The token is raised, so that what the former holder still does with its own is refused by who compares.
const FORCE_RELEASE: &str = "\
WITH mine AS MATERIALIZED (
    SELECT {keys}, {id} AS lock_id, {operation} AS operation, {by} AS locked_by, {acquired_at} AS acquired_at,
           {expires_at} AS expires_at, {token} AS fencing_token, {told}
    FROM {table} AS t WHERE {match 4} AND {id} IS NOT NULL FOR NO KEY UPDATE
), ended AS (
    UPDATE {table} AS t
    SET {clear}, {token} = leasehold.next_token(t.{token})
    FROM mine WHERE {same mine} AND mine.expires_at > clock_timestamp()
    RETURNING mine.*
), audited AS (
    INSERT INTO leasehold.lock_audit
           (name, released_by, reason, lock_id, operation, locked_by, acquired_at, expires_at, fencing_token)
    SELECT $1, $2, $3, lock_id, operation, locked_by, acquired_at, expires_at, fencing_token FROM ended
)
SELECT lock_id, operation, locked_by, instance, metadata, acquired_at, expires_at, fencing_token FROM ended";
