//! Each error of the domain as a client sees it.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::routing::get;
use leasehold_domain::{
    AcquireError, Contention, ErrorClass, ExtendError, HeldLock, Holder, HolderSession, Invalid, LockId,
    LockMode, LockName, ReleaseError, ResumeError, WithLockError,
};
use leasehold_http::{Code, Problem, Reason, RequestIdLayer};
use serde_json::{Value, json};

use crate::support::{Answer, ask, unavailable};

async fn answer(problem: Problem) -> Answer {
    let router = Router::new()
        .route("/it", get(async move || problem))
        .layer(RequestIdLayer);
    ask(&router, Request::get("/it").body(Body::empty()).unwrap()).await
}

fn name() -> LockName {
    LockName::new(["workspace", "acme", "main"]).unwrap()
}

/// A hold of which a backend knows everything, also what only operators may see.
fn contention() -> Contention {
    let session = HolderSession {
        backend_pid: 1_481_516_234,
        application_name: Some("psql-console".to_owned()),
        client_address: Some("db-7.internal".to_owned()),
    };
    Contention::with(HeldLock {
        holder: Some(Holder::new("bob", "PUT /x").with_instance("db-7.internal")),
        session: Some(session),
        ..HeldLock::unknown(name(), LockMode::Exclusive)
    })
}

fn unknown_holder() -> Contention {
    Contention {
        name: name(),
        held: None,
    }
}

fn acquire_errors() -> Vec<(AcquireError, u16, &'static str)> {
    let waited = Duration::from_secs(1);
    vec![
        (AcquireError::Contended(contention()), 409, "lock_held"),
        (AcquireError::Contended(unknown_holder()), 409, "lock_held"),
        (
            AcquireError::TimedOut {
                waited,
                contention: contention(),
            },
            409,
            "lock_held",
        ),
        (AcquireError::NotFound { name: name() }, 404, "not_found"),
        (
            AcquireError::Invalid(Invalid::new("ttl", "too short")),
            422,
            "invalid_request",
        ),
        (AcquireError::Unavailable(unavailable()), 503, "unavailable"),
        (
            AcquireError::OutcomeUnknown {
                lock_id: LockId::new(),
                source: unavailable(),
            },
            503,
            "unavailable",
        ),
    ]
}

/// `Answer::problem` scans each for what only operators may see.
#[tokio::test]
async fn every_error_of_the_domain_has_its_status_and_tells_no_secret() {
    for (error, status, code) in acquire_errors() {
        let retryable = error.is_retryable();
        let problem = answer(error.into()).await.problem(status, code);
        assert_eq!(problem["retryable"], retryable);
    }
    for (error, status, code) in acquire_errors() {
        let error = WithLockError::from(error);
        let retryable = error.is_retryable();
        let problem = answer(error.into()).await.problem(status, code);
        assert_eq!(problem["retryable"], retryable);
    }
    let problem = answer(WithLockError::Lost.into()).await.problem(409, "lock_lost");
    assert_eq!(problem["retryable"], true);

    let extend = [
        (ExtendError::Lost, 409, "lock_lost"),
        (ExtendError::MaxHoldReached, 409, "lock_lost"),
        (
            ExtendError::Invalid(Invalid::new("ttl", "too short")),
            422,
            "invalid_request",
        ),
        (ExtendError::Unavailable(unavailable()), 503, "unavailable"),
    ];
    for (error, status, code) in extend {
        let retryable = error.is_retryable();
        let problem = answer(error.into()).await.problem(status, code);
        assert_eq!(problem["retryable"], retryable);
    }
    let resume = [
        (
            ResumeError::NotHeld {
                lock_id: LockId::new(),
            },
            404,
            "not_found",
        ),
        (
            ResumeError::Invalid(Invalid::new("ttl", "too short")),
            422,
            "invalid_request",
        ),
        (ResumeError::Unavailable(unavailable()), 503, "unavailable"),
    ];
    for (error, status, code) in resume {
        let retryable = error.is_retryable();
        let problem = answer(error.into()).await.problem(status, code);
        assert_eq!(problem["retryable"], retryable);
    }
    answer(ReleaseError::Unavailable(unavailable()).into())
        .await
        .problem(503, "unavailable");
    answer(unavailable().into()).await.problem(503, "unavailable");
    let problem = answer(Invalid::new("ttl", "too short").into())
        .await
        .problem(422, "invalid_request");
    assert_eq!(
        problem["errors"],
        json!([{ "field": "ttl", "message": "too short" }])
    );
    let problem = answer(Problem::internal(unavailable()))
        .await
        .problem(500, "internal");
    let told: Vec<_> = problem.as_object().unwrap().keys().collect();
    let all = [
        "type",
        "title",
        "status",
        "detail",
        "instance",
        "code",
        "request_id",
        "retryable",
    ];
    assert_eq!(told.len(), all.len(), "{problem}");
}

/// Only a lost answer differs: the domain calls it internal, and here nothing was done under the lock yet.
#[test]
fn classes_and_statuses_agree() {
    for (error, status, _) in acquire_errors() {
        let expected = match error.class() {
            ErrorClass::Conflict => 409,
            ErrorClass::NotFound => 404,
            ErrorClass::Invalid => 422,
            ErrorClass::Unavailable | ErrorClass::Internal => 503,
        };
        assert_eq!(status, expected, "{error}");
    }
}

#[tokio::test]
async fn a_conflict_names_the_holder_with_null_for_what_is_not_known() {
    let problem = answer(Problem::contended(Code::WorkspaceLocked, &contention())).await;
    let problem = problem.problem(409, "workspace_locked");
    let lock = json!({
        "lock_id": null, "operation": "PUT /x", "locked_by": "bob",
        "acquired_at": null, "expires_at": null, "fencing_token": null,
    });
    assert_eq!(problem["lock"], lock);
    let problem = answer(Problem::contended(Code::WorkspaceLocked, &unknown_holder())).await;
    let problem = problem.problem(409, "workspace_locked");
    assert_eq!(problem["lock"].as_object().unwrap().len(), 6);
    assert!(problem["lock"].as_object().unwrap().values().all(Value::is_null));
}

#[tokio::test]
async fn every_code_is_answered_with_the_status_and_the_retry_of_the_table() {
    let table = [
        (Code::WorkspaceLocked, 409, true),
        (Code::TenantWriteConflict, 409, true),
        (Code::LockHeld, 409, true),
        (Code::LockLost, 409, true),
        (Code::ModifiedConcurrently, 409, true),
        (Code::AlreadyExists, 409, false),
        (Code::IdempotencyInProgress, 409, true),
        (Code::IdempotencyMismatch, 422, false),
        (Code::JobRunning, 409, false),
        (Code::VersionMismatch, 412, false),
        (Code::InvalidRequest, 422, false),
        (Code::MethodNotAllowed, 405, false),
        (Code::RequestTimeout, 408, true),
        (Code::Unauthenticated, 401, false),
        (Code::Forbidden, 403, false),
        (Code::NotFound, 404, false),
        (Code::Unavailable, 503, true),
        (Code::OutcomeUnknown, 500, false),
        (Code::Internal, 500, false),
    ];
    assert_eq!(table.map(|(code, ..)| code), Code::ALL);
    for (code, status, retryable) in table {
        let answered = answer(Problem::new(code, "as it is")).await;
        let problem = answered.problem(status, code.as_str());
        assert_eq!(problem["retryable"], retryable, "{code}");
        assert_eq!(problem["title"], code.title());
        assert_eq!(answered.header("www-authenticate").is_some(), status == 401);
    }
    let gate = Problem::new(Code::TenantWriteConflict, "a purge runs").with_reason(Reason::PurgeInProgress);
    assert_eq!(
        answer(gate).await.problem(409, "tenant_write_conflict")["reason"],
        "purge_in_progress"
    );
    let gate = Problem::new(Code::TenantWriteConflict, "writes run").with_reason(Reason::WritesInProgress);
    assert_eq!(
        answer(gate).await.problem(409, "tenant_write_conflict")["reason"],
        "writes_in_progress"
    );
    let lost = answer(Problem::lock_lost().not_retryable()).await;
    assert_eq!(lost.problem(409, "lock_lost")["retryable"], false);
    let id = LockId::new();
    let unknown = Problem::new(Code::OutcomeUnknown, "the answer to the commit was lost").with_lock(id);
    let unknown = answer(unknown).await.problem(500, "outcome_unknown");
    assert_eq!(unknown["lock"]["lock_id"], id.to_string());
}

/// `Answer::problem` checks each pair.
#[tokio::test]
async fn retry_after_is_the_same_time_in_both_places_and_jittered() {
    let mut seen = std::collections::HashSet::new();
    for _ in 0..50 {
        let problem = answer(Problem::new(Code::Unavailable, "busy"))
            .await
            .problem(503, "unavailable");
        seen.insert(problem["retry_after_ms"].as_u64().unwrap());
    }
    assert!(seen.len() > 10, "{seen:?}");
}
