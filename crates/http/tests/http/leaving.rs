//! Clients that leave: while they wait, while they hold, and while they are answered.

use std::time::Duration;

use axum::http::Request;

use crate::support::{App, Client, RENAME, alice, ask, rename, router, serve, until};

async fn free_again(app: &App) {
    until("the lock is free", || app.lock.held() == 0).await;
    let answer = ask(&router(app.clone()), rename("/plans/seven")).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn while_waiting() {
    let app = App::new();
    let address = serve(router(app.clone())).await;
    let held = app.lock.hold("seven").await;
    for _ in 0..10 {
        let mut client = Client::connect(address).await;
        client.put("/plans/seven", "prefer: wait=60\r\n").await;
        until("it waits", || app.lock.waiting() == 1).await;
        drop(client);
        until("it waits no more", || app.lock.waiting() == 0).await;
    }
    drop(held);
    free_again(&app).await;
    assert_eq!(app.entered(), 1, "no handler of those who left ran");
}

#[tokio::test]
async fn while_holding() {
    let app = App::new();
    let address = serve(router(app.clone())).await;
    for n in 1..=10 {
        let mut client = Client::connect(address).await;
        client.put("/plans/seven/hang", "").await;
        until("the handler runs", || app.entered() == n).await;
        assert_eq!(app.lock.held(), 1);
        drop(client);
        until("the lock is free", || app.lock.held() == 0).await;
    }
    free_again(&app).await;
}

#[tokio::test]
async fn while_being_answered() {
    let app = App::new();
    let address = serve(router(app.clone())).await;
    let mut client = Client::connect(address).await;
    client.put("/plans/seven/stream", "").await;
    assert_eq!(client.answer().await.status, 200);
    assert_eq!(
        app.lock.held(),
        0,
        "the lock is free before the first byte, also of an endless body"
    );
    drop(client);
    free_again(&app).await;
}

/// Leaves at every point of sending the request.
#[tokio::test]
async fn at_every_byte_of_the_request() {
    let app = App::new();
    let address = serve(router(app.clone())).await;
    let request = format!(
        "PUT /plans/seven HTTP/1.1\r\nhost: x\r\nauthorization: Bearer alice\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{RENAME}",
        RENAME.len()
    );
    for sent in (0..=request.len()).step_by(3).chain([request.len()]) {
        let mut client = Client::connect(address).await;
        client.send(&request.as_bytes()[..sent]).await;
    }
    free_again(&app).await;
}

#[tokio::test]
async fn work_in_a_task_of_its_own_keeps_its_lock_until_it_has_ended() {
    let app = App::new();
    let address = serve(router(app.clone())).await;
    let mut client = Client::connect(address).await;
    client.put("/plans/seven/detached", "").await;
    until("the task runs", || app.entered() == 1).await;
    drop(client);
    // A later request is served, so the server has had its turn; the loss of the client is noticed by then or not:
    // either way the lock is held.
    for _ in 0..20 {
        let other = router(app.clone());
        ask(&other, rename("/plans/seven"))
            .await
            .problem(409, "workspace_locked");
        tokio::task::yield_now().await;
    }
    app.finish.notify_one();
    free_again(&app).await;
}

#[tokio::test]
async fn a_wait_ends_with_the_lock_or_with_409() {
    let app = App::new();
    let router = router(app.clone());
    let wait = |seconds: &str| -> Request<_> {
        let request = alice("PUT", "/plans/seven").header("prefer", format!("wait={seconds}"));
        request.body(RENAME.into()).unwrap()
    };

    let held = app.lock.hold("seven").await;
    let waiting = tokio::spawn({
        let (router, request) = (router.clone(), wait("30"));
        async move { ask(&router, request).await }
    });
    until("it waits", || app.lock.waiting() == 1).await;
    drop(held);
    let answer = waiting.await.unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("preference-applied"), Some("wait=30"));

    let held = app.lock.hold("seven").await;
    let answer = ask(&router, wait("0")).await;
    answer.problem(409, "workspace_locked");
    assert_eq!(answer.header("preference-applied"), Some("wait=0"));
    // Never locked, so never waited.
    let unread = alice("PUT", "/plans/seven")
        .header("prefer", "wait=3")
        .body("{".into())
        .unwrap();
    assert_eq!(ask(&router, unread).await.header("preference-applied"), None);
    assert_eq!(
        ask(&router, rename("/plans/seven"))
            .await
            .header("preference-applied"),
        None
    );
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn a_wait_is_cut_to_the_longest_that_the_service_allows() {
    let app = App::new();
    let router = router(app.clone());
    for (plan, asked, applied) in [("nine", "3600", 60), ("seven", "5", 5), ("impatient", "3600", 0)] {
        let _held = app.lock.hold(plan).await;
        let start = tokio::time::Instant::now();
        let request = alice("PUT", &format!("/plans/{plan}")).header("prefer", format!("wait={asked}"));
        let answer = ask(&router, request.body(RENAME.into()).unwrap()).await;
        answer.problem(409, "workspace_locked");
        assert_eq!(
            answer.header("preference-applied"),
            Some(&*format!("wait={applied}"))
        );
        let waited = start.elapsed();
        assert!(
            (Duration::from_secs(applied)..Duration::from_secs(applied + 1)).contains(&waited),
            "{waited:?}"
        );
    }
}
