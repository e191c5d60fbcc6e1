//! Credentials: who asks, whether they may, and in which tenant.
//!
//! A key is `lh_` and 256 random bits. Only its SHA-256 is stored: a key of that many bits cannot be found from
//! its hash, so nothing slower is needed. One statement tells who has it and whether the tenant of the path exists.

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use axum::extract::{FromRequestParts, RawPathParams};
use axum::http::request::Parts;
use chrono::{DateTime, Utc};
use clap::ValueEnum;
use diesel::OptionalExtension;
use diesel::prelude::*;
use diesel::sql_types::{Bool, Bytea, Double, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use leasehold_http::{ApiPath, BearerToken, Problem};
use leasehold_storage::Prepared;
use rand::Rng;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::state::AppState;

/// What a key may do. Each role may do what the ones before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Role {
    /// Reads, and resolves.
    Reader,
    /// Writes, and takes locks.
    Writer,
    /// Takes locks away from others; with a key for all tenants, makes tenants.
    Admin,
}

impl Role {
    /// As it is stored.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Writer => "writer",
            Self::Admin => "admin",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Reader, Self::Writer, Self::Admin]
            .into_iter()
            .find(|role| role.as_str() == text)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who asks.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The id of the key that it came with.
    pub credential: Uuid,
    /// The name under which locks are held and versions are made.
    pub subject: String,
    /// What it may do.
    pub role: Role,
    /// The only tenant it may see; `None` when it may see all.
    pub tenant: Option<String>,
}

/// The role that an [`Access`] needs.
pub trait Needs: Send + Sync + 'static {
    /// The least role that will do.
    const ROLE: Role;
    /// Whether a key of one tenant will not do.
    const ALL_TENANTS: bool = false;
}

/// Any key will do.
#[derive(Debug)]
pub struct Read;
/// A writer's key.
#[derive(Debug)]
pub struct Write;
/// An admin's key.
#[derive(Debug)]
pub struct Manage;
/// An admin's key for all tenants.
#[derive(Debug)]
pub struct Operate;

impl Needs for Read {
    const ROLE: Role = Role::Reader;
}
impl Needs for Write {
    const ROLE: Role = Role::Writer;
}
impl Needs for Manage {
    const ROLE: Role = Role::Admin;
}
impl Needs for Operate {
    const ROLE: Role = Role::Admin;
    const ALL_TENANTS: bool = true;
}

/// A caller who may do what `R` needs in the tenant of the path, and the path: the first argument of a handler.
///
/// In this order: 401 without a valid key, 403 when its role is too low, 404 when the path names a tenant that
/// does not exist or is not the key's, 400 when the rest of the path cannot be read. The extractors after it find the
/// caller in the request's extensions.
#[derive(Debug)]
pub struct Access<P, R = Read> {
    /// Who asks.
    pub caller: Identity,
    /// What the path says.
    pub path: P,
    needs: PhantomData<R>,
}

/// The path of a resource that belongs to no tenant.
#[derive(Debug, serde::Deserialize)]
pub struct NoTenant {}

impl<P, R> FromRequestParts<AppState> for Access<P, R>
where
    P: DeserializeOwned + Send,
    R: Needs,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, Problem> {
        let token = BearerToken::from_request_parts(parts, state).await?;
        let params = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|_| unreadable_path())?;
        let tenant = params
            .iter()
            .find_map(|(name, value)| (name == "tenant").then_some(value));
        let caller = authenticate::<R>(state, &token, tenant).await?;
        parts.extensions.insert(caller.clone());
        let ApiPath(path) = ApiPath::from_request_parts(parts, state).await?;
        Ok(Self {
            caller,
            path,
            needs: PhantomData,
        })
    }
}

fn unreadable_path() -> Problem {
    Problem::malformed("path", "is not UTF-8")
}

#[derive(QueryableByName)]
struct Found {
    #[diesel(sql_type = SqlUuid)]
    id: Uuid,
    #[diesel(sql_type = Text)]
    subject: String,
    #[diesel(sql_type = Text)]
    role: String,
    #[diesel(sql_type = Nullable<Text>)]
    tenant_id: Option<String>,
    #[diesel(sql_type = Bool)]
    tenant_exists: bool,
}

const FIND: &str = "
    SELECT c.id, c.subject, c.role, c.tenant_id, EXISTS (SELECT FROM tenants t WHERE t.id = $2) AS tenant_exists
    FROM credentials c
    WHERE c.key_sha256 = $1
      AND (c.expires_at IS NULL OR c.expires_at > clock_timestamp())
      AND (NOT c.only_on_loopback OR $3)";

/// How long the database may take to tell whose a key is: then the caller can try again.
const ANSWER: Duration = Duration::from_secs(5);

async fn authenticate<R: Needs>(
    state: &AppState,
    token: &BearerToken,
    tenant: Option<&str>,
) -> Result<Identity, Problem> {
    let hash = hash(token.secret());
    // Postgres has no text with NUL, and so no tenant.
    let asked = tenant.filter(|tenant| !tenant.contains('\0'));
    let found: Option<Found> = state
        .read_within(ANSWER, async |conn| {
            let find = diesel::sql_query(FIND)
                .bind::<Bytea, _>(&hash[..])
                .bind::<Nullable<Text>, _>(asked)
                .bind::<Bool, _>(state.settings().on_loopback);
            Ok(Prepared(find).one(conn).await.optional()?)
        })
        .await?;
    let found = found.ok_or_else(Problem::unauthenticated)?;
    let role =
        Role::parse(&found.role).ok_or_else(|| Problem::internal(format!("no such role: {}", found.role)))?;
    if role < R::ROLE {
        return Err(Problem::forbidden(format!(
            "this needs the role {}; the key's is {role}",
            R::ROLE
        )));
    }
    if R::ALL_TENANTS && found.tenant_id.is_some() {
        return Err(Problem::forbidden("this needs a key for all tenants"));
    }
    let theirs = |tenant: &str| found.tenant_id.as_deref().is_none_or(|own| own == tenant);
    match tenant {
        Some(tenant) if !found.tenant_exists || !theirs(tenant) => {
            Err(Problem::not_found("there is no such tenant"))
        }
        _ => Ok(Identity {
            credential: found.id,
            subject: found.subject,
            role,
            tenant: found.tenant_id,
        }),
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// What a new key is for.
#[derive(Clone, Debug)]
pub struct NewCredential {
    /// The name under which locks are held and versions are made: 1 to 256 bytes.
    pub subject: String,
    /// What it may do.
    pub role: Role,
    /// The only tenant it may see; `None` for all.
    pub tenant: Option<String>,
    /// How long it is good for, in seconds; `None` for ever.
    pub expires_in_seconds: Option<f64>,
    /// Whether it is accepted only by a service that listens on loopback.
    pub only_on_loopback: bool,
}

/// A key as operators see it. The key itself is nowhere.
#[derive(Clone, Debug, QueryableByName, serde::Serialize)]
pub struct Credential {
    /// To revoke it by.
    #[diesel(sql_type = SqlUuid)]
    pub id: Uuid,
    /// The name under which locks are held and versions are made.
    #[diesel(sql_type = Text)]
    pub subject: String,
    /// What it may do.
    #[diesel(sql_type = Text)]
    pub role: String,
    /// The only tenant it may see; `None` for all.
    #[diesel(sql_type = Nullable<Text>)]
    pub tenant_id: Option<String>,
    /// When it was made.
    #[diesel(sql_type = Timestamptz)]
    pub created_at: DateTime<Utc>,
    /// When it ends.
    #[diesel(sql_type = Nullable<Timestamptz>)]
    pub expires_at: Option<DateTime<Utc>>,
    /// Whether it has ended.
    #[diesel(sql_type = Bool)]
    pub expired: bool,
}

/// A fresh key: `lh_` and 256 random bits.
pub fn new_key() -> String {
    let mut bits = [0_u8; 32];
    rand::rng().fill(&mut bits);
    bits.iter()
        .fold("lh_".to_owned(), |key, byte| format!("{key}{byte:02x}"))
}

const CREATE: &str = "
    INSERT INTO credentials (id, key_sha256, subject, role, tenant_id, only_on_loopback, expires_at)
    VALUES ($1, $2, $3, $4, $5, $6, clock_timestamp() + make_interval(secs => $7))
    ON CONFLICT (key_sha256) DO NOTHING";

/// Stores a key, as its hash. One that is stored already stays as it is.
///
/// # Errors
/// A foreign-key violation when there is no such tenant; whatever else the database says.
pub async fn store(conn: &mut AsyncPgConnection, key: &str, new: &NewCredential) -> QueryResult<()> {
    let create = diesel::sql_query(CREATE)
        .bind::<SqlUuid, _>(Uuid::now_v7())
        .bind::<Bytea, _>(hash(key).to_vec())
        .bind::<Text, _>(&new.subject)
        .bind::<Text, _>(new.role.as_str())
        .bind::<Nullable<Text>, _>(&new.tenant)
        .bind::<Bool, _>(new.only_on_loopback)
        .bind::<Nullable<Double>, _>(new.expires_in_seconds);
    create.execute(conn).await.map(|_| ())
}

/// All keys, oldest first.
///
/// # Errors
/// What the database says.
pub async fn list(conn: &mut AsyncPgConnection) -> QueryResult<Vec<Credential>> {
    diesel::sql_query(
        "SELECT id, subject, role, tenant_id, created_at, expires_at,
                coalesce(expires_at <= clock_timestamp(), false) AS expired
         FROM credentials ORDER BY seq",
    )
    .load(conn)
    .await
}

/// Ends a key at once. False when there is none with this id.
///
/// # Errors
/// What the database says.
pub async fn revoke(conn: &mut AsyncPgConnection, id: Uuid) -> QueryResult<bool> {
    let revoke = diesel::sql_query("DELETE FROM credentials WHERE id = $1").bind::<SqlUuid, _>(id);
    revoke.execute(conn).await.map(|ended| ended == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_long_and_differ() {
        let (one, other) = (new_key(), new_key());
        assert!(one.starts_with("lh_") && one.len() == 67, "{one}");
        assert_ne!(one, other);
    }

    #[test]
    fn roles_are_ordered_and_read_back() {
        assert!(Role::Reader < Role::Writer && Role::Writer < Role::Admin);
        for role in [Role::Reader, Role::Writer, Role::Admin] {
            assert_eq!(Role::parse(role.as_str()), Some(role));
        }
    }
}
