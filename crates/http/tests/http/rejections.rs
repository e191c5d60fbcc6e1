//! Whatever is wrong with a request, the answer is a problem and never a 5xx.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{Request, StatusCode};
use leasehold_http::{BODY_READ_TIMEOUT, X_REQUEST_ID};

use crate::support::{Answer, App, Client, RENAME, alice, ask, layered, rename, router, serve};

#[tokio::test]
async fn every_refusal_of_the_router_is_a_problem() {
    let app = App::new();
    let router = router(app);
    let get = |uri: &str| Request::get(uri).body(Body::empty()).unwrap();
    let post = |uri: &str| Request::post(uri).body(Body::empty()).unwrap();

    let unknown = ask(&router, get("/no/such/thing?secret=1"))
        .await
        .problem(404, "not_found");
    assert_eq!(unknown["instance"], "/no/such/thing", "the query stays out");
    let answer = ask(&router, get("/numbers/1")).await;
    answer.problem(405, "method_not_allowed");
    assert_eq!(answer.header("allow"), Some("POST"));
    let bad = ask(&router, post("/numbers/one"))
        .await
        .problem(400, "invalid_request");
    assert_eq!(bad["errors"][0]["field"], "path");
    ask(&router, post("/numbers/%ff"))
        .await
        .problem(400, "invalid_request");
    ask(&router, post("/numbers/1%00"))
        .await
        .problem(400, "invalid_request");
    assert_eq!(ask(&router, post("/numbers/1")).await.body, b"1");

    for (query, status) in [
        ("limit=x", 400),
        ("limit=", 400),
        ("limit=-1", 400),
        ("limit=0", 422),
        ("limit=201", 422),
    ] {
        let problem = ask(&router, get(&format!("/list?{query}")))
            .await
            .problem(status, "invalid_request");
        assert_eq!(problem["errors"][0]["field"], "limit", "{query}");
    }
    ask(&router, get("/list?limit=1%00"))
        .await
        .problem(400, "invalid_request");
    assert_eq!(ask(&router, get("/list?limit=200")).await.body, b"200");

    let answer = ask(
        &router,
        Request::post("/plans/a/search").body(Body::empty()).unwrap(),
    )
    .await;
    answer.problem(415, "invalid_request");
    let answer = ask(&router, Request::get("/plans/a").body(Body::empty()).unwrap()).await;
    answer.problem(405, "method_not_allowed");
    let mut allowed: Vec<_> = answer.header("allow").unwrap().split(',').collect();
    allowed.sort_unstable();
    assert_eq!(allowed, ["DELETE", "PUT"]);
}

#[tokio::test]
async fn a_head_of_what_is_not_there_has_no_body() {
    let address = serve(router(App::new())).await;
    let mut client = Client::connect(address).await;
    for _ in 0..2 {
        client.send("HEAD /nothing HTTP/1.1\r\nhost: x\r\n\r\n").await;
        // The head tells the length that a GET would have; reading it as a body would block.
        let answer = client.head().await;
        assert_eq!(answer.status, 404);
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    }
}

#[tokio::test]
async fn what_others_answer_without_a_word_becomes_a_problem_and_the_rest_is_left_alone() {
    use axum::routing::get;
    let plain = |status: u16| {
        (
            StatusCode::from_u16(status).unwrap(),
            "text of somebody else: db-7.internal",
        )
    };
    let router = axum::Router::new()
        .route(
            "/status/{status}",
            get(move |axum::extract::Path(status): axum::extract::Path<u16>| async move { plain(status) }),
        )
        .route(
            "/own",
            get(async || (StatusCode::BAD_REQUEST, axum::Json("mine"))),
        )
        .route("/plain", get(async |_: axum::extract::Path<u16>| {}));
    let router = layered(router, App::new());
    let get = |uri: String| Request::get(uri).body(Body::empty()).unwrap();
    let statuses = [
        (400, "invalid_request"),
        (401, "unauthenticated"),
        (403, "forbidden"),
        (404, "not_found"),
        (405, "method_not_allowed"),
        (408, "request_timeout"),
        (413, "invalid_request"),
        (415, "invalid_request"),
        (422, "invalid_request"),
        (500, "internal"),
        (503, "unavailable"),
    ];
    for (status, code) in statuses {
        ask(&router, get(format!("/status/{status}")))
            .await
            .problem(status, code);
    }
    for untouched in [200, 404 + 14, 451] {
        let answer = ask(&router, get(format!("/status/{untouched}"))).await;
        assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
        assert!(answer.header("x-request-id").is_some());
    }
    let own = ask(&router, get("/own".to_owned())).await;
    assert_eq!((own.status, own.body.as_slice()), (400, &br#""mine""#[..]));
    // A handler whose type does not fit its route: axum's own text says so to the client.
    ask(&router, get("/plain".to_owned()))
        .await
        .problem(500, "internal");
}

#[tokio::test]
async fn content_types() {
    let router = router(App::new());
    let with = |value: &'static [u8]| {
        let request = Request::post("/plans/a/search").header("content-type", value);
        request.body(Body::from(RENAME)).unwrap()
    };
    for good in [
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/merge-patch+json",
        "application/json;",
    ] {
        assert_eq!(ask(&router, with(good.as_bytes())).await.status, 200, "{good}");
    }
    let bad: [&[u8]; 7] = [
        b"",
        b"text/plain",
        b"text/json",
        b"application/x-www-form-urlencoded",
        b"application/jsonp",
        b"json",
        b"\xff",
    ];
    for bad in bad {
        ask(&router, with(bad)).await.problem(415, "invalid_request");
    }
    let coded = alice("POST", "/plans/a/search").header("content-encoding", "gzip");
    ask(&router, coded.body(Body::from("\x1f\u{8b}")).unwrap())
        .await
        .problem(415, "invalid_request");
}

fn large(bytes: usize) -> String {
    format!("{{\"title\":\"{}\"}}", "x".repeat(bytes - 12))
}

const MIB: usize = 1024 * 1024;

#[tokio::test]
async fn a_body_may_have_one_mebibyte_and_no_byte_more() {
    let app = App::new();
    let router = router(app.clone());
    let of = |bytes| alice("PUT", "/plans/a").body(Body::from(large(bytes))).unwrap();
    ask(&router, of(MIB)).await.problem(422, "invalid_request");
    ask(&router, of(MIB + 1)).await.problem(413, "invalid_request");

    let address = serve(router).await;
    // A client that sends everything before it looks at the answer gets to see it, with and without a length.
    // More than the buffers of both ends can take up.
    let body = large(14 * MIB);
    let head = "PUT /plans/a HTTP/1.1\r\nhost: x\r\nauthorization: Bearer alice\r\ncontent-type: application/json\r\n";
    let mut client = Client::connect(address).await;
    client
        .send(format!("{head}content-length: {}\r\n\r\n{body}", body.len()))
        .await;
    client.answer().await.problem(413, "invalid_request");
    let mut client = Client::connect(address).await;
    client
        .send(format!(
            "{head}transfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
            body.len()
        ))
        .await;
    client.answer().await.problem(413, "invalid_request");
    // One that asks first is told before it sends.
    let mut client = Client::connect(address).await;
    client
        .send(format!(
            "{head}expect: 100-continue\r\ncontent-length: {}\r\n\r\n",
            body.len()
        ))
        .await;
    client.answer().await.problem(413, "invalid_request");
    assert_eq!(app.lock.attempts(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_a_timeout() {
    let app = App::new();
    let begun = futures_util::stream::iter([Ok::<_, Infallible>(Bytes::from_static(b"{"))]);
    let body = Body::from_stream(futures_util::StreamExt::chain(
        begun,
        futures_util::stream::pending(),
    ));
    let start = tokio::time::Instant::now();
    let answer = ask(&router(app.clone()), alice("PUT", "/plans/a").body(body).unwrap()).await;
    answer.problem(408, "request_timeout");
    assert!(start.elapsed() < BODY_READ_TIMEOUT + Duration::from_secs(1));
    assert_eq!(app.lock.attempts(), 0);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_malformed() {
    let broken = futures_util::stream::iter([Err::<Bytes, _>(std::io::Error::other("hunter2"))]);
    let body = Body::from_stream(broken);
    let answer = ask(&router(App::new()), alice("PUT", "/plans/a").body(body).unwrap()).await;
    answer.problem(400, "invalid_request");
}

#[tokio::test]
async fn an_array_does_not_pass_for_an_object() {
    let router = router(App::new());
    for body in [r#"["blue"]"#, " [\"blue\"] ", "[]", "null", "7"] {
        let answer = ask(&router, alice("PUT", "/plans/a").body(Body::from(body)).unwrap()).await;
        let problem = answer.problem(422, "invalid_request");
        assert_eq!(problem["errors"][0]["field"], "body", "{body}");
    }
}

#[tokio::test]
async fn what_a_client_sent_is_not_repeated_at_length() {
    let router = router(App::new());
    let body = format!("{{\"{}\":1}}", "k".repeat(MIB / 2));
    let answer = ask(&router, alice("PUT", "/plans/a").body(Body::from(body)).unwrap()).await;
    answer.problem(422, "invalid_request");
    assert!(answer.body.len() < 4096, "{} bytes", answer.body.len());
}

#[tokio::test]
async fn hostile_requests_are_never_an_error_of_the_service() {
    let router = router(App::new());
    let bodies: [&[u8]; 12] = [
        b"",
        b"\0",
        b"\xff\xfe",
        b"{\"title\":\"\xc3\x28\"}",
        br#"{"title":"\u0000"}"#,
        br#"{"title":"\ud800"}"#,
        br#"{"title":"a","title":"b"}"#,
        br#"{"title":["a"]}"#,
        br#"{"title":1e999}"#,
        br#"{"__proto__":1,"title":"a"}"#,
        b"[[[[[[[[[[",
        b"\xef\xbb\xbf{\"title\":\"a\"}",
    ];
    for body in bodies {
        let answer = ask(&router, alice("PUT", "/plans/a").body(Body::from(body)).unwrap()).await;
        assert!([400, 422].contains(&answer.status), "{answer:?}");
    }
    for path in [
        "/plans/a%00b",
        "/plans/%ff",
        "/plans/%2F%2e%2e",
        "/plans/%0d%0aset-cookie:x",
        "/plans/a?limit=%00",
    ] {
        let answer: Answer = ask(&router, rename(path)).await;
        assert!(answer.status < 500, "{answer:?}");
        assert!(answer.header("set-cookie").is_none());
    }
    let long = format!("/plans/{}", "x".repeat(600));
    ask(&router, rename(&long)).await.problem(422, "invalid_request");
}

#[tokio::test]
async fn a_request_id_comes_back_whatever_the_answer() {
    let router = router(App::new());
    for uri in ["/plans/seven", "/nothing", "/plans/away", "/plans/seven/panic"] {
        let mut request = rename(uri);
        request
            .headers_mut()
            .insert(X_REQUEST_ID, "client-chose.this_1".parse().unwrap());
        assert_eq!(
            ask(&router, request).await.header("x-request-id"),
            Some("client-chose.this_1"),
            "{uri}"
        );

        let mut request = rename(uri);
        request
            .headers_mut()
            .insert(X_REQUEST_ID, "not { sane".parse().unwrap());
        let made = ask(&router, request)
            .await
            .header("x-request-id")
            .unwrap()
            .to_owned();
        assert_ne!(made, "not { sane");
        assert_ne!(
            ask(&router, rename(uri)).await.header("x-request-id").unwrap(),
            made
        );
    }
}
