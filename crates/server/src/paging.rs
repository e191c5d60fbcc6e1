//! Lists: oldest first, a page at a time.

use std::fmt;

use leasehold_http::{FieldError, Validate};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::{IntoParams, ToSchema};

const DEFAULT_LIMIT: i64 = 50;
const MAX_LIMIT: i64 = 200;

/// Which page of a list to answer.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// The most items of the page.
    #[serde(default)]
    #[param(value_type = i64, required = false, minimum = 1, maximum = 200, default = 50)]
    limit: Option<i64>,
    /// `next_cursor` of the page before.
    #[serde(default)]
    #[param(value_type = String, required = false, min_length = 1)]
    cursor: Option<Cursor>,
}

impl Validate for PageQuery {
    fn validate(&self) -> Vec<FieldError> {
        match self.limit {
            Some(limit) if !(1..=MAX_LIMIT).contains(&limit) => {
                vec![FieldError::new("limit", format!("must be from 1 to {MAX_LIMIT}"))]
            }
            _ => Vec::new(),
        }
    }
}

impl PageQuery {
    /// The position after which the page begins.
    pub(crate) fn after(&self) -> i64 {
        self.cursor.map_or(i64::MIN, |Cursor(position)| position)
    }

    /// How many rows to ask for: one more than the page holds, to know whether another follows.
    pub(crate) fn rows(&self) -> i64 {
        self.limit.unwrap_or(DEFAULT_LIMIT) + 1
    }

    /// Makes a page of rows that were asked for by [`PageQuery::after`] and [`PageQuery::rows`].
    pub(crate) fn page<R, T>(
        &self,
        mut rows: Vec<R>,
        position: impl Fn(&R) -> i64,
        item: impl Fn(R) -> T,
    ) -> Page<T> {
        let limit = usize::try_from(self.rows() - 1).unwrap_or_default();
        let more = rows.len() > limit;
        rows.truncate(limit);
        let next_cursor = if more {
            rows.last().map(|row| Cursor(position(row)))
        } else {
            None
        };
        Page {
            items: rows.into_iter().map(item).collect(),
            next_cursor,
        }
    }
}

/// A page of a list.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Page<T> {
    /// Oldest first.
    pub items: Vec<T>,
    /// Where the next page begins; `null` on the last one.
    #[schema(value_type = Option<String>, required)]
    pub next_cursor: Option<Cursor>,
}

/// A position in a list. What it is made of is nobody's business but ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor(i64);

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c{:016x}", self.0)
    }
}

impl Serialize for Cursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cursor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text
            .strip_prefix('c')
            .filter(|digits| digits.len() == 16 && !digits.starts_with('+'));
        let position = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        position
            .map(|position| Self(position.cast_signed()))
            .ok_or_else(|| serde::de::Error::custom("must be the next_cursor of an earlier answer"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_reads_back_and_nothing_else_does() {
        for position in [0, 1, 77, i64::MAX, i64::MIN, -1] {
            let text = serde_json::to_value(Cursor(position)).unwrap();
            assert_eq!(serde_json::from_value::<Cursor>(text).unwrap(), Cursor(position));
        }
        for bad in [
            "",
            "c",
            "c1",
            "x0000000000000001",
            "c000000000000000g",
            "c00000000000000001",
            "c+000000000000001",
        ] {
            let read = serde_json::from_value::<Cursor>(bad.into());
            assert!(read.is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_last_page_says_so() {
        let query = PageQuery {
            limit: Some(2),
            cursor: None,
        };
        let page = |rows: Vec<i64>| query.page(rows, |row| *row, |row| row);
        assert_eq!(page(vec![1, 2]).next_cursor, None);
        let first = page(vec![1, 2, 3]);
        assert_eq!((first.items, first.next_cursor), (vec![1, 2], Some(Cursor(2))));
        assert_eq!(page(vec![]).next_cursor, None);
    }
}
