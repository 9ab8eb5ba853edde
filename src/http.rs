//! What operators' tools ask over plain HTTP: `/metrics`, `/livez`, `/readyz`.

use crate::telemetry::{Metrics, Readiness};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use std::{io, net::SocketAddr};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Prometheus' text exposition format.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A bound socket.
pub struct HttpServer {
    socket: TcpListener,
    local_addr: SocketAddr,
}

impl HttpServer {
    /// Binds `http.listen`.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = TcpListener::bind(address).await?;
        Ok(Self { local_addr: socket.local_addr()?, socket })
    }

    /// The address with the port that was bound.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until `stop`, then lets what was begun end.
    pub async fn serve(self, metrics: Metrics, readiness: Readiness, stop: CancellationToken) -> io::Result<()> {
        axum::serve(self.socket, router(metrics, readiness)).with_graceful_shutdown(stop.cancelled_owned()).await
    }
}

fn router(metrics: Metrics, readiness: Readiness) -> Router {
    let metrics = Router::new().route("/metrics", get(show_metrics)).with_state(metrics);
    Router::new().route("/livez", get(|| async { "alive\n" })).route("/readyz", get(show_readiness)).with_state(readiness).merge(metrics)
}

async fn show_metrics(State(metrics): State<Metrics>) -> impl IntoResponse {
    ([(CONTENT_TYPE, EXPOSITION)], metrics.render())
}

async fn show_readiness(State(readiness): State<Readiness>) -> impl IntoResponse {
    let state = readiness.state();
    let status = if state.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, state.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    /// The whole answer to a GET, head and body.
    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("it answers in UTF-8");
        answer
    }

    #[tokio::test]
    async fn probes_and_scrapes_are_answered_until_the_stop() {
        let server = HttpServer::bind(([127, 0, 0, 1], 0).into()).await.expect("a free port");
        let (address, readiness, stop) = (server.local_addr(), Readiness::starting(&["store"]), CancellationToken::new());
        let serving = tokio::spawn(server.serve(Metrics::new(), readiness.clone(), stop.clone()));

        assert!(get(address, "/livez").await.starts_with("HTTP/1.1 200 "));
        let starting = get(address, "/readyz").await;
        assert!(starting.starts_with("HTTP/1.1 503 ") && starting.ends_with("\r\n\r\nstore: not ready: starting\n"), "{starting}");
        readiness.set("store", Ok(()));
        let ready = get(address, "/readyz").await;
        assert!(ready.starts_with("HTTP/1.1 200 ") && ready.ends_with("\r\n\r\nstore: ready\n"), "{ready}");

        let scrape = get(address, "/metrics").await;
        assert!(scrape.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{scrape}");
        assert!(scrape.contains("\ntidegate_build_info{version="), "{scrape}");
        assert!(scrape.contains("\nprocess_resident_memory_bytes "), "{scrape}");
        assert!(get(address, "/").await.starts_with("HTTP/1.1 404 "));

        stop.cancel();
        serving.await.expect("no panic").expect("no error");
        TcpStream::connect(address).await.expect_err("it is closed");
    }
}
