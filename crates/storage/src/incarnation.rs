//! [`Incarnation`]: one life of the server, from its start or a recovery to the next crash.
//!
//! The id of a transaction that was under way in a crash is given out again, unless something of it had reached
//! the disk. So what `pg_xact_status` says of an id is about our transaction only if the server has not crashed
//! since. A server discards its statistics with every crash, and a promoted standby has its own: when they began
//! tells one life from another, and every role may ask for it. Whoever resets the statistics by hand looks like a
//! crash, which errs on the safe side.
//!
//! <https://www.postgresql.org/docs/current/monitoring-stats.html>

use chrono::{DateTime, Utc};
use diesel::QueryableByName;
use diesel::sql_types::{Nullable, Timestamptz};

/// Equal ones mean that the server has not crashed in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Incarnation(DateTime<Utc>);

/// What a query with [`COLUMN`] answers.
#[derive(QueryableByName)]
pub(crate) struct IncarnationRow {
    #[diesel(sql_type = Nullable<Timestamptz>)]
    incarnation: Option<DateTime<Utc>>,
}

/// The column that [`IncarnationRow`] reads.
pub(crate) const COLUMN: &str = "pg_stat_get_bgwriter_stat_reset_time() AS incarnation";

impl IncarnationRow {
    /// `None` when the server does not know, and then nothing can be told from it.
    pub(crate) fn get(&self) -> Option<Incarnation> {
        self.incarnation.map(Incarnation)
    }
}
