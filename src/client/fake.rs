//! A gateway for the clients' tests: it keeps the contract's sequence rules in memory, and breaks as it is told to.

use crate::{
    error::Error,
    model::{DeviceId, StreamId, Violation, structs},
    pb::{
        self, connect_request, connect_response,
        device_link_service_server::{DeviceLinkService, DeviceLinkServiceServer},
        telemetry_service_server::{TelemetryService, TelemetryServiceServer},
    },
};
use bytes::Bytes;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// What the gateway does with the next batch, other than storing and acknowledging it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing wrong.
    None,
    /// Ends the call with UNAVAILABLE, without storing.
    FailBefore,
    /// Stores, and ends the call with UNAVAILABLE instead of an acknowledgement.
    FailAfter,
    /// Stores, and cuts all connections.
    Cut,
    /// Stores, and says nothing more on this stream.
    Mute,
    /// Forgets the batch, as if it had never come: what follows is a gap.
    Miss,
    /// Stores, acknowledges, and ends as a gateway does that is being stopped.
    Drain,
    /// Rejects the batch.
    Reject,
}

/// What the gateway has of one stream id.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    /// The batches in the order of their storing.
    pub batches: Vec<(u64, Bytes)>,
    /// The last durable sequence.
    pub last: u64,
    /// Received again.
    pub duplicates: u64,
    /// Batches told lost, and readings in them.
    pub lost: (u64, u64),
}

#[derive(Default)]
struct State {
    streams: Mutex<BTreeMap<StreamId, Stored>>,
    faults: Mutex<VecDeque<Fault>>,
    /// Sent to each link behind its Welcome.
    config: Mutex<Option<(u64, serde_json::Map<String, serde_json::Value>)>>,
    reports: Mutex<Vec<pb::ConfigReport>>,
    hellos: Mutex<Vec<pb::Hello>>,
    cut: Notify,
}

/// The gateway's handle. Clients connect through a cable that can be cut.
#[derive(Clone)]
pub struct FakeGateway {
    address: SocketAddr,
    state: Arc<State>,
}

impl FakeGateway {
    pub async fn start() -> Self {
        let state = Arc::new(State::default());
        let server = listen().await;
        let server_address = server.local_addr().expect("bound");
        let service = Service(state.clone());
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(TelemetryServiceServer::new(service.clone()))
                .add_service(DeviceLinkServiceServer::new(service))
                .serve_with_incoming(TcpListenerStream::new(server)),
        );
        let cable = listen().await;
        let address = cable.local_addr().expect("bound");
        tokio::spawn(carry(cable, server_address, state.clone()));
        Self { address, state }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What to do with the next batches, one each.
    pub fn set_faults(&self, faults: impl IntoIterator<Item = Fault>) {
        *self.state.faults.lock() = faults.into_iter().collect();
    }

    pub fn set_config(&self, revision: u64, config: serde_json::Value) {
        *self.state.config.lock() = Some((revision, config.as_object().expect("an object").clone()));
    }

    pub fn set_last(&self, stream_id: StreamId, last: u64) {
        self.state.streams.lock().entry(stream_id).or_default().last = last;
    }

    pub fn stored(&self, stream_id: StreamId) -> Stored {
        self.state.streams.lock().get(&stream_id).cloned().unwrap_or_default()
    }

    pub fn reports(&self) -> Vec<pb::ConfigReport> {
        self.state.reports.lock().clone()
    }

    pub fn hellos(&self) -> Vec<pb::Hello> {
        self.state.hellos.lock().clone()
    }

    /// Ends every connection at once.
    pub fn cut(&self) {
        self.state.cut.notify_waiters();
    }
}

async fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.expect("a free port")
}

async fn carry(cable: TcpListener, server: SocketAddr, state: Arc<State>) {
    while let Ok((mut client, _)) = cable.accept().await {
        let state = state.clone();
        tokio::spawn(async move {
            let cut = state.cut.notified();
            let Ok(mut server) = TcpStream::connect(server).await else { return };
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                () = cut => {}
            }
        });
    }
}

#[derive(Clone)]
struct Service(Arc<State>);

/// What became of one batch.
enum Outcome {
    Stored,
    Duplicate,
    Gap(u64),
}

impl Service {
    fn next_fault(&self) -> Fault {
        self.0.faults.lock().pop_front().unwrap_or(Fault::None)
    }

    fn store(&self, stream_id: StreamId, sequence: u64, bytes: Bytes, lost: (u64, u64), keep: bool) -> (Outcome, u64) {
        let mut streams = self.0.streams.lock();
        let stored = streams.entry(stream_id).or_default();
        if sequence <= stored.last {
            stored.duplicates += 1;
            return (Outcome::Duplicate, stored.last);
        }
        if sequence - lost.0 > stored.last + 1 {
            return (Outcome::Gap(stored.last + 1), stored.last);
        }
        stored.lost = (stored.lost.0 + lost.0, stored.lost.1 + lost.1);
        if keep {
            stored.batches.push((sequence, bytes));
        }
        stored.last = sequence;
        (Outcome::Stored, sequence)
    }

    fn last(&self, stream_id: StreamId) -> u64 {
        self.0.streams.lock().get(&stream_id).map_or(0, |stored| stored.last)
    }

    /// Serves one link; the error ends the call.
    async fn link(&self, mut inbound: Streaming<pb::ConnectRequest>, out: &mpsc::Sender<Answer>) -> Result<(), Status> {
        let Some(pb::ConnectRequest { message: Some(connect_request::Message::Hello(hello)) }) = inbound.message().await? else {
            return Err(Error::invalid("message", "not a Hello").into());
        };
        DeviceId::parse(&hello.device).map_err(|why| Error::invalid("hello.device", why))?;
        let stream_id = stream_id(&hello.stream_id)?;
        let applied_revision = hello.applied_revision;
        self.0.hellos.lock().push(hello);
        let welcome = pb::Welcome { last_durable_sequence: self.last(stream_id), server_time: None };
        say(out, connect_response::Message::Welcome(welcome)).await;
        let config = self.0.config.lock().clone().filter(|(revision, _)| *revision != applied_revision);
        if let Some((revision, config)) = config {
            let update = pb::ConfigUpdate { revision, config: Some(structs::from_json(&config)) };
            say(out, connect_response::Message::ConfigUpdate(update)).await;
        }
        let mut mute = false;
        while let Some(request) = inbound.message().await? {
            match request.message {
                Some(connect_request::Message::Batch(batch)) => self.link_batch(stream_id, batch, &mut mute, out).await?,
                Some(connect_request::Message::ConfigReport(report)) => self.0.reports.lock().push(report),
                _ => return Err(Error::invalid("message", "not expected").into()),
            }
        }
        Ok(())
    }

    async fn link_batch(&self, id: StreamId, batch: pb::LinkBatch, mute: &mut bool, out: &mpsc::Sender<Answer>) -> Result<(), Status> {
        let fault = self.next_fault();
        match fault {
            Fault::FailBefore => return Err(Error::StoreUnavailable.into()),
            Fault::Miss => return Ok(()),
            _ => {}
        }
        let lost = (batch.lost_batches, batch.lost_readings);
        let (outcome, last) = self.store(id, batch.sequence, batch.batch, lost, fault != Fault::Reject);
        match fault {
            Fault::FailAfter => return Err(Status::unavailable("killed")),
            Fault::Cut => self.0.cut.notify_waiters(),
            Fault::Mute => *mute = true,
            _ => {}
        }
        if *mute || fault == Fault::Cut {
            return Ok(());
        }
        let message = match outcome {
            Outcome::Gap(expected_sequence) => {
                connect_response::Message::SequenceGap(pb::SequenceGap { expected_sequence, received_sequence: batch.sequence })
            }
            Outcome::Stored | Outcome::Duplicate => connect_response::Message::Ack(pb::BatchAck {
                last_durable_sequence: last,
                duplicate_batches: u64::from(matches!(outcome, Outcome::Duplicate)),
                rejected: (fault == Fault::Reject).then(|| rejected(batch.sequence)).into_iter().collect(),
            }),
        };
        say(out, message).await;
        if fault == Fault::Drain {
            say(out, connect_response::Message::Draining(pb::Draining {})).await;
        }
        Ok(())
    }
}

type Answer = Result<pb::ConnectResponse, Status>;

async fn say(out: &mpsc::Sender<Answer>, message: connect_response::Message) {
    // A client that is gone hears nothing.
    let _ = out.send(Ok(pb::ConnectResponse { message: Some(message) })).await;
}

fn rejected(sequence: u64) -> pb::RejectedBatch {
    pb::RejectedBatch { sequence, reason: pb::RejectReason::KindChanged as i32, field: String::new(), message: String::new(), readings: 1 }
}

fn stream_id(bytes: &[u8]) -> Result<StreamId, Status> {
    StreamId::parse(bytes).map_err(|why| Error::InvalidArgument(vec![Violation::new("stream_id", why)]).into())
}

#[tonic::async_trait]
impl DeviceLinkService for Service {
    type ConnectStream = ReceiverStream<Answer>;

    async fn connect(&self, request: Request<Streaming<pb::ConnectRequest>>) -> Result<Response<Self::ConnectStream>, Status> {
        let (out, answers) = mpsc::channel(64);
        let service = self.clone();
        tokio::spawn(async move {
            if let Err(status) = service.link(request.into_inner(), &out).await {
                let _ = out.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

#[tonic::async_trait]
impl TelemetryService for Service {
    async fn upload(&self, request: Request<Streaming<pb::UploadRequest>>) -> Result<Response<pb::UploadResponse>, Status> {
        let mut inbound = request.into_inner();
        let mut id = None;
        let mut response =
            pb::UploadResponse { accepted: Some(pb::Tally::default()), duplicate: Some(pb::Tally::default()), ..Default::default() };
        while let Some(upload) = inbound.message().await? {
            let id = match id {
                Some(id) => id,
                None => *id.insert(stream_id(&upload.stream_id)?),
            };
            let fault = self.next_fault();
            match fault {
                Fault::FailBefore => return Err(Error::StoreUnavailable.into()),
                Fault::Miss => continue,
                _ => {}
            }
            let (sequence, lost) = (upload.sequence, (upload.lost_batches, upload.lost_readings));
            let (outcome, last) = self.store(id, sequence, upload.batch, lost, fault != Fault::Reject);
            response.last_durable_sequence = last;
            match outcome {
                Outcome::Gap(expected) => {
                    let device = DeviceId::parse("fake").expect("good");
                    return Err(Error::SequenceGap { device, stream_id: id, expected, received: sequence }.into());
                }
                Outcome::Duplicate => response.duplicate.get_or_insert_default().batches += 1,
                Outcome::Stored if fault == Fault::Reject => {
                    response.rejected.push(rejected(sequence));
                    let reason = pb::RejectReason::KindChanged as i32;
                    response.rejected_counts.push(pb::RejectedCount { reason, batches: 1, readings: 1 });
                }
                Outcome::Stored => response.accepted.get_or_insert_default().batches += 1,
            }
            match fault {
                Fault::FailAfter | Fault::Mute => return Err(Status::unavailable("killed")),
                Fault::Cut => self.0.cut.notify_waiters(),
                Fault::Drain => return Ok(Response::new(response)),
                _ => {}
            }
        }
        Ok(Response::new(response))
    }

    async fn get_upload_position(
        &self,
        request: Request<pb::GetUploadPositionRequest>,
    ) -> Result<Response<pb::GetUploadPositionResponse>, Status> {
        let last_durable_sequence = self.last(stream_id(&request.into_inner().stream_id)?);
        Ok(Response::new(pb::GetUploadPositionResponse { last_durable_sequence }))
    }
}
