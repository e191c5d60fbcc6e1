//! The order of answers: what is refused for another reason never touches the lock.

use axum::body::Body;

use crate::support::{App, RENAME, alice, ask, rename, router};

#[tokio::test]
async fn while_it_is_locked_only_a_valid_write_is_told_so() {
    let app = App::new();
    let router = router(app.clone());
    let held = app.lock.hold("held").await;
    let uri = "/plans/held";
    let with =
        |builder: axum::http::request::Builder, body: &'static str| builder.body(Body::from(body)).unwrap();

    let nobody = axum::http::Request::put(uri).body(Body::from(RENAME)).unwrap();
    ask(&router, nobody).await.problem(401, "unauthenticated");
    let stranger = axum::http::Request::put(uri).header("authorization", "Bearer mallory");
    ask(&router, with(stranger, "{"))
        .await
        .problem(401, "unauthenticated");
    let reader = axum::http::Request::put(uri).header("authorization", "Bearer reader");
    ask(&router, with(reader, "{")).await.problem(403, "forbidden");
    ask(&router, with(alice("PUT", "/plans/unknown?limit=x"), "{"))
        .await
        .problem(404, "not_found");
    ask(&router, with(alice("PUT", "/plans/held?limit=x"), RENAME))
        .await
        .problem(400, "invalid_request");
    ask(&router, with(alice("PUT", uri), "{"))
        .await
        .problem(400, "invalid_request");
    ask(&router, with(alice("PUT", uri), r#"{"title":""}"#))
        .await
        .problem(422, "invalid_request");
    ask(&router, with(alice("PUT", uri), r#"{"title":5}"#))
        .await
        .problem(422, "invalid_request");
    let text = axum::http::Request::put(uri).header("authorization", "Bearer alice");
    ask(&router, with(text, RENAME))
        .await
        .problem(415, "invalid_request");
    ask(&router, with(alice("PUT", "/plans/archived"), "{"))
        .await
        .problem(400, "invalid_request");
    ask(&router, rename("/plans/archived"))
        .await
        .problem(404, "not_found");
    let answered = ask(&router, rename("/plans/renamed")).await;
    assert_eq!(
        (answered.status, &*answered.body),
        (200, "it has that name already".as_bytes())
    );
    assert_eq!(app.lock.attempts(), 0);

    let problem = ask(&router, rename(uri)).await.problem(409, "workspace_locked");
    assert_eq!(app.lock.attempts(), 1);
    assert_eq!(problem["lock"]["locked_by"], "bob@example.com");
    assert_eq!(problem["lock"]["operation"], "PUT /plans/held");
    assert_eq!(problem["lock"]["acquired_at"], "2000-01-01T00:00:00.000000Z");
    assert_eq!(problem["lock"]["expires_at"], serde_json::Value::Null);
    assert_eq!(problem["lock"]["lock_id"], held.lock_id().to_string());
    assert_eq!(problem["lock"]["fencing_token"], 7);

    let read = ask(&router, with(alice("POST", "/plans/held/search"), RENAME)).await;
    assert_eq!(read.status, 200, "a read does not ask for the lock");
    assert_eq!(app.entered(), 0);
}

#[tokio::test]
async fn a_row_that_does_not_exist_is_404_and_an_absent_backend_503() {
    let app = App::new();
    let router = router(app);
    ask(&router, rename("/plans/gone"))
        .await
        .problem(404, "not_found");
    ask(&router, rename("/plans/away"))
        .await
        .problem(503, "unavailable");
}

#[tokio::test]
async fn the_holder_is_the_caller_and_its_operation_fits() {
    let app = App::new();
    let routes = axum::Router::new().nest("/v1", crate::support::routes());
    let router = crate::support::layered(routes, app.clone());
    let long = format!("/v1/plans/{}", "x".repeat(400));
    // A valid name, and a path that is longer than a holder's operation may be.
    assert_eq!(ask(&router, rename(&long)).await.status, 200);

    let hang = tokio::spawn({
        let router = router.clone();
        async move { ask(&router, rename("/v1/plans/seven/hang")).await }
    });
    crate::support::until("the handler runs", || app.entered() == 2).await;
    let problem = ask(&router, rename("/v1/plans/seven"))
        .await
        .problem(409, "workspace_locked");
    assert_eq!(problem["lock"]["locked_by"], "alice");
    assert_eq!(
        problem["lock"]["operation"], "PUT /v1/plans/seven/hang",
        "the whole path, also when nested"
    );
    assert_eq!(problem["instance"], "/v1/plans/seven");
    hang.abort();
}

#[tokio::test]
async fn a_slow_body_holds_no_lock() {
    let app = App::new();
    let address = crate::support::serve(router(app.clone())).await;
    let mut slow = crate::support::Client::connect(address).await;
    slow.send(format!(
        "PUT /plans/seven HTTP/1.1\r\nhost: x\r\nauthorization: Bearer alice\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        RENAME.len()
    ))
    .await;
    crate::support::until("the slow request is authorized", || app.authorized() == 1).await;
    for byte in RENAME.as_bytes() {
        assert_eq!(app.lock.held(), 0);
        let mut quick = crate::support::Client::connect(address).await;
        quick.put("/plans/seven", "").await;
        assert_eq!(quick.answer().await.status, 200);
        slow.send([*byte]).await;
    }
    assert_eq!(slow.answer().await.status, 200);
}

#[tokio::test]
async fn without_credentials_a_flood_takes_no_lock() {
    let app = App::new();
    let router = router(app.clone());
    for _ in 0..200 {
        let request = axum::http::Request::put("/plans/seven")
            .body(Body::from(RENAME))
            .unwrap();
        ask(&router, request).await.problem(401, "unauthenticated");
    }
    assert_eq!(app.lock.attempts(), 0);
}
