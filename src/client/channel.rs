//! The way to a gateway, with what shows who comes along it.

use crate::trace::{TRACEPARENT, TraceParent};
use http::{HeaderValue, Request, Response, header::AUTHORIZATION};
use std::{
    fmt,
    task::{Context, Poll},
    time::Duration,
};
use tonic::{
    body::Body,
    transport::{self, Certificate, ClientTlsConfig, Endpoint, Identity, channel::ResponseFuture},
};
use tower::Service;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A silent connection is asked after this time whether it is alive, so that a cut cable is noticed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// How long the answer may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Whom to trust, and how to be known. The default trusts the public authorities and shows nothing.
#[derive(Clone, Default)]
pub struct Credentials {
    /// The authorities of the gateway's certificate (PEM); `None`: the public ones. For `https` only.
    pub authorities: Option<Vec<u8>>,
    /// A client certificate with its chain, and its key (PEM). For `https` only.
    pub certificate: Option<(Vec<u8>, Vec<u8>)>,
    /// A token, which goes along with each call.
    pub token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (certificate, token) = (self.certificate.is_some(), self.token.is_some());
        f.debug_struct("Credentials").field("certificate", &certificate).field("token", &token).finish_non_exhaustive()
    }
}

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The endpoint is not a URI, or the certificates can't be used.
    #[error("the endpoint or the certificates can't be used")]
    Transport(#[from] transport::Error),
    /// The token has characters that no token has.
    #[error("this is not a token")]
    Token,
}

/// A channel to a gateway. It connects when it is first used, and again whenever it has to; several devices may share it.
/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Channel {
    inner: transport::Channel,
    authorization: Option<HeaderValue>,
    trace: Option<TraceParent>,
}

impl Channel {
    /// A channel that shows `token` with each call; `None`: nothing.
    pub fn new(inner: transport::Channel, token: Option<&str>) -> Result<Self, ChannelError> {
        let header = |token: &str| HeaderValue::from_str(&format!("Bearer {token}"));
        let mut authorization = token.map(header).transpose().map_err(|_| ChannelError::Token)?;
        // Not to be shown in any log.
        authorization.iter_mut().for_each(|value| value.set_sensitive(true));
        Ok(Self { inner, authorization, trace: None })
    }

    /// The same connection, for somebody else: each call shows `token`.
    pub fn with_token(&self, token: &str) -> Result<Self, ChannelError> {
        Ok(Self { trace: self.trace, ..Self::new(self.inner.clone(), Some(token))? })
    }

    /// The same connection, all of whose calls are of one trace, which the gateway is asked to record: what a person asks for. Otherwise each
    /// call begins a trace of its own, of which the gateway records as many as it is set to.
    pub fn in_one_trace(self) -> Self {
        Self { trace: Some(TraceParent { sampled: true, ..TraceParent::new_trace() }), ..self }
    }
}

/// Without a token.
impl From<transport::Channel> for Channel {
    fn from(inner: transport::Channel) -> Self {
        Self { inner, authorization: None, trace: None }
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = transport::Error;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), transport::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> ResponseFuture {
        if let Some(value) = &self.authorization {
            request.headers_mut().insert(AUTHORIZATION, value.clone());
        }
        let trace = self.trace.map_or_else(TraceParent::new_trace, TraceParent::next_span);
        request.headers_mut().entry(TRACEPARENT).or_insert_with(|| trace.to_header());
        self.inner.call(request)
    }
}

/// A channel to the gateway at `endpoint`, such as `http://127.0.0.1:50051`, without credentials.
///
/// # Errors
/// When `endpoint` is not a URI.
pub fn connect_lazy(endpoint: &str) -> Result<Channel, ChannelError> {
    connect_lazy_with(endpoint, &Credentials::default())
}

/// A channel to the gateway at `endpoint`, such as `https://gateway.example.com`, with credentials.
///
/// # Errors
/// When `endpoint` is not a URI, or the credentials can't be used.
pub fn connect_lazy_with(endpoint: &str, credentials: &Credentials) -> Result<Channel, ChannelError> {
    let endpoint = endpoint_with(endpoint, credentials)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    Channel::new(endpoint.connect_lazy(), credentials.token.as_deref())
}

/// An endpoint that does its handshakes with these credentials.
pub fn endpoint_with(endpoint: &str, credentials: &Credentials) -> Result<Endpoint, ChannelError> {
    let endpoint = Endpoint::from_shared(endpoint.to_owned())?;
    if endpoint.uri().scheme_str() != Some("https") {
        return Ok(endpoint);
    }
    let tls = match &credentials.authorities {
        Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
        None => ClientTlsConfig::new().with_webpki_roots(),
    };
    let tls = match &credentials.certificate {
        Some((chain, key)) => tls.identity(Identity::from_pem(chain, key)),
        None => tls,
    };
    Ok(endpoint.tls_config(tls)?)
}
