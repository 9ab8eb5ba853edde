//! The two ends that talk through the gateway: a device on a Connect stream, an operator on a Configure stream.

use super::{
    client::{TestDevice, configs, devices, links},
    soon,
};
use serde_json::Value;
use tidegate::client::Channel;
use tidegate::{
    model::{Timestamp, structs},
    pb::{
        self, ConfigOutcome, ConfigState, configure_request, configure_response, connect_request, connect_response, set_config,
        watch_config,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// A device on a Connect stream.
pub struct Link {
    pub up: mpsc::Sender<pb::ConnectRequest>,
    pub down: Streaming<pb::ConnectResponse>,
}

impl Link {
    pub async fn open(device: &TestDevice, applied_revision: u64) -> (Self, pb::Welcome) {
        let (up, requests) = mpsc::channel(256);
        let down = links(&device.channel).connect(ReceiverStream::new(requests)).await.expect("the call begins").into_inner();
        let mut link = Self { up, down };
        let stream_id = device.stream_id.as_bytes().to_vec().into();
        link.say(connect_request::Message::Hello(pb::Hello { device: device.id.clone(), stream_id, applied_revision })).await;
        match link.next().await {
            connect_response::Message::Welcome(welcome) => (link, welcome),
            other => panic!("not welcome: {other:?}"),
        }
    }

    /// Opens one, and answers the Welcome with the times of a clock that is `micros` ahead.
    pub async fn open_with_clock(device: &TestDevice, micros: i64) -> Self {
        let (link, welcome) = Self::open(device, 0).await;
        let by_its_clock = || Timestamp::from_micros(Timestamp::now().micros() + micros).map(Timestamp::to_proto);
        let sample = pb::ClockSample { server_time: welcome.server_time, receive_time: by_its_clock(), send_time: by_its_clock() };
        link.say(connect_request::Message::ClockSample(sample)).await;
        link
    }

    pub async fn say(&self, message: connect_request::Message) {
        self.up.send(pb::ConnectRequest { message: Some(message) }).await.expect("the call is open");
    }

    pub async fn send_batch(&self, sequence: u64, batch: bytes::Bytes) {
        self.say(connect_request::Message::Batch(pb::LinkBatch { sequence, batch, ..Default::default() })).await;
    }

    pub async fn report(&self, revision: u64, outcome: ConfigOutcome, detail: &str) {
        let report = pb::ConfigReport { revision, outcome: outcome.into(), detail: detail.into() };
        self.say(connect_request::Message::ConfigReport(report)).await;
    }

    pub async fn try_next(&mut self) -> Result<Option<connect_response::Message>, Status> {
        let response = soon("the next message", self.down.message()).await?;
        Ok(response.map(|response| response.message.expect("set")))
    }

    pub async fn next(&mut self) -> connect_response::Message {
        self.try_next().await.expect("no error").expect("not the end")
    }

    pub async fn next_config(&mut self) -> (u64, Value) {
        match self.next().await {
            connect_response::Message::ConfigUpdate(update) => {
                (update.revision, Value::Object(structs::to_json(&update.config.expect("set")).expect("JSON")))
            }
            other => panic!("not a configuration: {other:?}"),
        }
    }

    /// Takes acknowledgements up to a sequence.
    pub async fn acknowledged(&mut self, sequence: u64) -> Vec<pb::BatchAck> {
        let mut acks = Vec::new();
        loop {
            match self.next().await {
                connect_response::Message::Ack(ack) => {
                    acks.push(ack);
                    if acks.last().is_some_and(|ack| ack.last_durable_sequence >= sequence) {
                        return acks;
                    }
                }
                other => panic!("not an acknowledgement: {other:?}"),
            }
        }
    }
}

/// An operator on a Configure stream.
pub struct Desk {
    pub up: mpsc::Sender<pb::ConfigureRequest>,
    pub down: Streaming<pb::ConfigureResponse>,
}

impl Desk {
    pub async fn open(channel: &Channel) -> Self {
        let (up, requests) = mpsc::channel(16);
        let down = configs(channel).configure(ReceiverStream::new(requests)).await.expect("the call begins").into_inner();
        Self { up, down }
    }

    pub async fn say(&self, message: configure_request::Message) {
        self.up.send(pb::ConfigureRequest { message: Some(message) }).await.expect("the call is open");
    }

    pub async fn set(&self, request_id: &str, target: set_config::Target, config: Value, etag: &str) {
        let config = config.as_object().map(structs::from_json);
        let set = pb::SetConfig { request_id: request_id.into(), config, etag: etag.into(), comment: String::new(), target: Some(target) };
        self.say(configure_request::Message::Set(set)).await;
    }

    pub async fn watch(&self, target: watch_config::Target) {
        self.say(configure_request::Message::Watch(pb::WatchConfig { target: Some(target) })).await;
    }

    pub async fn next(&mut self) -> configure_response::Message {
        soon("the next message", self.down.message()).await.expect("no error").expect("not the end").message.expect("set")
    }

    /// The next event; the ends of requests before it are passed over.
    pub async fn event(&mut self) -> pb::ConfigEvent {
        match self.next_but_done().await {
            configure_response::Message::Event(event) => event,
            other => panic!("not an event: {other:?}"),
        }
    }

    pub async fn next_but_done(&mut self) -> configure_response::Message {
        loop {
            match self.next().await {
                configure_response::Message::SetDone(_) => {}
                message => return message,
            }
        }
    }

    /// The end of a request, which must be next: its request id, and how many devices were accepted and refused.
    pub async fn done(&mut self) -> (String, u64, u64) {
        match self.next().await {
            configure_response::Message::SetDone(done) => (done.request_id, done.accepted, done.refused),
            other => panic!("not the end of a request: {other:?}"),
        }
    }

    /// Closes our side; the gateway must then end the stream well.
    pub async fn close(self) {
        let Self { up, mut down } = self;
        drop(up);
        assert_eq!(soon("the end", down.message()).await.expect("OK"), None);
    }

    /// The next event's device, revision and state.
    pub async fn step(&mut self) -> (String, u64, ConfigState) {
        let event = self.event().await;
        (event.device.clone(), event.revision, event.state())
    }

    pub async fn refusal(&mut self) -> pb::ConfigRefusal {
        match self.next_but_done().await {
            configure_response::Message::Refusal(refusal) => refusal,
            other => panic!("not a refusal: {other:?}"),
        }
    }
}

pub fn device_target(id: &str) -> set_config::Target {
    set_config::Target::Device(id.into())
}

pub fn step(device: &str, revision: u64, state: ConfigState) -> (String, u64, ConfigState) {
    (device.to_owned(), revision, state)
}

pub async fn create(channel: &Channel, id: &str, labels: &[(&str, &str)]) {
    let labels = labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    let device = pb::Device { id: id.into(), labels, ..Default::default() };
    devices(channel).create_device(pb::CreateDeviceRequest { device: Some(device) }).await.expect("created");
}
