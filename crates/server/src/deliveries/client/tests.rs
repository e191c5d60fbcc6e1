//! Against servers on loopback, which answer as they are told.

use axum::http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::mpsc;

use super::*;

/// Answers every connection with this text, and tells the requests.
async fn server(answer: &'static str) -> (SocketAddr, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (heard, requests) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let heard = heard.clone();
            tokio::spawn(async move {
                let mut read = vec![0; 64 * 1024];
                while let Ok(length @ 1..) = stream.read(&mut read).await {
                    heard
                        .send(String::from_utf8_lossy(&read[..length]).into_owned())
                        .ok();
                    stream.write_all(answer.as_bytes()).await.ok();
                }
            });
        }
    });
    (address, requests)
}

fn post(url: &str) -> Request<Full<Bytes>> {
    let request = Request::builder().method(Method::POST).uri(url);
    request.body(Full::from("body")).unwrap()
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn a_request_arrives_and_its_status_comes_back() {
    let (address, mut requests) = server(OK).await;
    let client = HttpClient::new(true).unwrap();
    let status = client
        .send(post(&format!("http://{address}/a?b=c")))
        .await
        .unwrap();
    assert_eq!(status, StatusCode::OK);
    let request = requests.recv().await.unwrap();
    assert!(request.starts_with("POST /a?b=c HTTP/1.1\r\n"), "{request}");
    assert!(request.contains(&format!("host: {address}\r\n")), "{request}");
    assert!(request.ends_with("\r\n\r\nbody"), "{request}");
}

#[tokio::test]
async fn loopback_is_refused_however_it_is_written() {
    let (address, mut requests) = server(OK).await;
    let client = HttpClient::new(false).unwrap();
    let port = address.port();
    for host in [
        "127.0.0.1",
        "localhost",
        "127.1",
        "2130706433",
        "0x7f.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "0.0.0.0",
        "[::]",
    ] {
        for scheme in ["http", "https"] {
            let refused = client.send(post(&format!("{scheme}://{host}:{port}/"))).await;
            assert!(
                matches!(refused, Err(SendError::NotPublic | SendError::Failed(_))),
                "{scheme} {host}"
            );
        }
    }
    let refused = client.send(post(&format!("http://127.0.0.1:{port}/"))).await;
    assert!(matches!(refused, Err(SendError::NotPublic)), "{refused:?}");
    assert!(requests.try_recv().is_err(), "nobody was connected to");
}

/// A listener whose queue is full says neither yes nor no.
#[tokio::test]
async fn an_address_that_is_silent_leaves_time_for_the_next_one() {
    let full = TcpSocket::new_v4().unwrap();
    full.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let full = full.listen(1).unwrap();
    let silent = full.local_addr().unwrap();
    let mut connected = Vec::new();
    while let Ok(one_more) = timeout(Duration::from_millis(200), TcpStream::connect(silent)).await {
        connected.push(one_more.unwrap());
        assert!(connected.len() < 100, "the queue is never full");
    }
    let (address, _requests) = server(OK).await;
    let stream = timeout(CONNECT, connect(&[silent, address])).await;
    let stream = stream.expect("in time").unwrap();
    assert_eq!(stream.peer_addr().unwrap(), address);
}

#[tokio::test]
async fn a_redirect_is_an_answer_and_is_not_followed() {
    let (elsewhere, mut not_asked) = server(OK).await;
    let redirect =
        format!("HTTP/1.1 307 Look there\r\nlocation: http://{elsewhere}/\r\ncontent-length: 0\r\n\r\n");
    let (address, _requests) = server(Box::leak(redirect.into_boxed_str())).await;
    let client = HttpClient::new(true).unwrap();
    let status = client.send(post(&format!("http://{address}/"))).await.unwrap();
    assert_eq!(status, StatusCode::TEMPORARY_REDIRECT);
    assert!(not_asked.try_recv().is_err());
}

#[tokio::test]
async fn an_answer_without_an_end_is_told_by_its_status() {
    let (address, _requests) =
        server("HTTP/1.1 202 Fine\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n").await;
    let client = HttpClient::new(true).unwrap();
    let status = client.send(post(&format!("http://{address}/"))).await.unwrap();
    assert_eq!(status, StatusCode::ACCEPTED);
}

#[tokio::test]
async fn a_closed_port_is_told_without_where_it_is() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let client = HttpClient::new(true).unwrap();
    let failed = client
        .send(post(&format!("http://{address}/")))
        .await
        .unwrap_err();
    assert!(matches!(&failed, SendError::Failed(_)), "{failed:?}");
    let text = failed.to_string();
    assert!(text.contains("refused"), "{text}");
    assert!(!text.contains("127.0.0.1"), "{text}");
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let (address, _requests) = server("").await;
    let client = HttpClient {
        whole: Duration::from_millis(100),
        ..HttpClient::new(true).unwrap()
    };
    let late = client
        .send(post(&format!("http://{address}/")))
        .await
        .unwrap_err();
    assert!(matches!(late, SendError::TooLate(_)), "{late:?}");
}
