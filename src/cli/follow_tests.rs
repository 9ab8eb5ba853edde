use super::*;
use crate::{
    error::Error,
    pb::live_service_server::{LiveService, LiveServiceServer},
};
use std::{pin::Pin, sync::Arc};
use tokio::net::TcpListener;
use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status};

#[test]
fn where_to_begin_is_a_word_a_time_or_a_token() {
    let parsed = |text| parse_start(text).expect("infallible");
    assert_eq!(parsed("latest"), Start::Latest(true));
    assert_eq!(parsed("live"), Start::LiveOnly(true));
    assert_eq!(parsed("beginning"), Start::Beginning(true));
    assert!(matches!(parsed("1970-01-01T00:00:01Z"), Start::ReceiveTime(time) if time.seconds == 1));
    assert!(matches!(parsed("-5m"), Start::ReceiveTime(_)));
    assert_eq!(parsed("AAAAAAAAAAE"), Start::ResumeToken("AAAAAAAAAAE".into()));
}

fn batch(value: f64) -> pb::Batch {
    let column =
        |sensor: &str, unit: &str, values: Values| pb::Column { sensor: sensor.into(), unit: unit.into(), values: Some(values.into()) };
    pb::Batch {
        frames: vec![pb::Frame {
            base_time_us: 1_795_238_521_000_000,
            time_deltas_us: vec![1_000_000],
            columns: vec![
                column("temperature", "Cel", Values::Double(vec![value, value + 1.0])),
                column("state", "", Values::Text(vec!["on".into(), "a\nb".into()])),
            ],
            ..Default::default()
        }],
    }
}

fn live(value: f64) -> Message {
    Message::Readings(pb::LiveReadings {
        device: "pump-1".into(),
        receive_time: None,
        batches: 1,
        batch: batch(value).encode_to_vec().into(),
    })
}

#[test]
fn lines_are_readings_in_the_order_of_their_rows() {
    let mut out = Vec::new();
    write_lines(live(21.37), &mut out).expect("memory takes it");
    assert_eq!(
        String::from_utf8(out).expect("UTF-8"),
        "2026-11-21T05:22:01.000Z  pump-1  temperature  21.37 Cel\n\
         2026-11-21T05:22:01.000Z  pump-1  state  on\n\
         2026-11-21T05:22:02.000Z  pump-1  temperature  22.37 Cel\n\
         2026-11-21T05:22:02.000Z  pump-1  state  a\\nb\n"
    );
}

#[test]
fn json_lines_carry_the_token_behind_their_readings() {
    let mut out = Vec::new();
    write_json(live(1.5), "t7", &mut out).expect("memory takes it");
    let line: Json = serde_json::from_slice(&out).expect("one object");
    assert_eq!((&line["type"], &line["resume_token"], &line["readings"][3]["value"]), (&json!("readings"), &json!("t7"), &json!("a\nb")));
}

/// A gateway that goes away after its first message, then refuses a token.
#[derive(Default)]
struct Faltering {
    starts: parking_lot::Mutex<Vec<Option<Start>>>,
}

type Responses = Pin<Box<dyn Stream<Item = Result<pb::FollowResponse, Status>> + Send>>;

#[tonic::async_trait]
impl LiveService for Faltering {
    type FollowStream = Responses;

    async fn follow(&self, request: Request<pb::FollowRequest>) -> Result<Response<Responses>, Status> {
        let mut starts = self.starts.lock();
        starts.push(request.into_inner().start);
        let (value, end) = match starts.len() {
            1 => (1.0, Error::Draining),
            2 => (2.0, Error::PositionExpired { oldest: crate::model::Position(1) }),
            _ => return Err(Status::internal("a third call")),
        };
        let message = pb::FollowResponse { message: Some(live(value)), resume_token: format!("after {value}") };
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(message), Err(end.into())]))))
    }
}

async fn serve(service: Arc<Faltering>) -> ClientArgs {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    let server = tonic::transport::Server::builder().add_service(LiveServiceServer::from_arc(service));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    ClientArgs { endpoint, timeout: Duration::from_secs(10), credentials: Default::default() }
}

/// Scenario: the gateway drains in the middle of a stream. Guarantee: the follower goes on from its token, shows each reading
/// once, and ends when the gateway refuses for good.
#[tokio::test]
async fn a_follower_goes_on_from_its_token() {
    let service = Arc::new(Faltering::default());
    let client = serve(service.clone()).await;
    let args = FollowArgs {
        devices: vec![],
        selector: String::new(),
        sensors: vec![],
        from: Start::Beginning(true),
        until_live: false,
        json: false,
        client,
    };
    let mut out = Vec::new();
    let failure = tokio::time::timeout(Duration::from_secs(30), follow(args, &mut out)).await.expect("in time").expect_err("refused");
    assert!(failure.text().contains("POSITION_EXPIRED"), "{}", failure.text());
    assert_eq!(*service.starts.lock(), [Some(Start::Beginning(true)), Some(Start::ResumeToken("after 1".into()))]);
    let shown = String::from_utf8(out).expect("UTF-8");
    let temperatures: Vec<&str> = shown.lines().filter_map(|line| line.split("temperature  ").nth(1)).collect();
    assert_eq!(temperatures, ["1 Cel", "2 Cel", "2 Cel", "3 Cel"]);
}

/// Scenario: who reads our output goes away. Guarantee: that ends the command, and is no error of the gateway's.
#[tokio::test]
async fn a_closed_output_ends_the_command() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let client = serve(Arc::default()).await;
    let args = FollowArgs {
        devices: vec![],
        selector: String::new(),
        sensors: vec![],
        from: Start::Latest(true),
        until_live: false,
        json: true,
        client,
    };
    let failure = follow(args, &mut Closed).await.expect_err("closed");
    assert!(matches!(&failure, Failure::Io(error) if error.kind() == std::io::ErrorKind::BrokenPipe), "{failure:?}");
    assert!(!failure.is_passing());
}
