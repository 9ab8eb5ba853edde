//! Texts, and other small things, that callers, operators and certificates say.

use super::Input;
use crate::{
    api::{export::Ticket, live, parse},
    auth::token::Presented,
    cli,
    config::DatabaseUrl,
    error::Violations,
    middleware::deadline,
    model::{DeviceId, LabelSelector, Labels, StreamId, Timestamp, structs, time::duration_from_proto},
    pb,
    tls::peer::PeerCertificate,
};
use http::HeaderValue;
use prost::Message;

/// Guarantees: nothing panics, and what is taken says the same when it is written and read again. The first byte says what it is.
pub fn text(data: &[u8]) {
    let mut input = Input(data);
    let what = input.byte();
    let bytes = input.0;
    let text = String::from_utf8_lossy(bytes);
    match what % 12 {
        0 => id(&text, bytes),
        1 => selector(&text),
        2 => labels(&text),
        3 => {
            if let Some(token) = Presented::parse(&text) {
                assert!(token.id.is_ascii() && text.contains(&format!("_{}_", token.id)));
            }
        }
        4 => database_url(&text),
        5 => resume_tokens(&text),
        6 => page_token(&text),
        7 => struct_of(bytes),
        8 => times(bytes),
        9 => {
            if let Ok(value) = HeaderValue::from_bytes(bytes) {
                let _ = deadline::parse(&value);
            }
        }
        10 => command_line(&text),
        _ => {
            let _ = PeerCertificate::new(&[bytes.into()]);
        }
    }
}

fn id(text: &str, bytes: &[u8]) {
    if let Ok(id) = DeviceId::parse(text) {
        assert_eq!(id.as_str(), text);
    }
    if let Ok(id) = StreamId::parse(bytes) {
        assert_eq!(id.as_bytes(), bytes);
    }
    let _ = parse::resource(text);
}

fn selector(text: &str) {
    let Ok(selector) = LabelSelector::parse(text) else { return };
    assert_eq!(LabelSelector::parse(&selector.to_string()), Ok(selector.clone()));
    let _ = selector.matches(&Labels::default());
}

fn labels(text: &str) {
    let pairs = text.split('\n').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    if let Ok(labels) = Labels::parse("labels", pairs.map(|(key, value)| (key.to_owned(), value.to_owned()))) {
        assert_eq!(Labels::from_json(&labels.to_json()).expect("its own JSON"), labels);
    }
    let _ = Labels::from_json(text);
}

fn database_url(text: &str) {
    let shown = DatabaseUrl::new(text).to_string();
    // What is shown in place of a password is not taken for one.
    if DatabaseUrl::is_allowed(text) && shown.contains("***") && !text.contains("***") {
        assert!(!DatabaseUrl::is_allowed(&shown), "{shown}");
    }
    if let Ok(url) = url::Url::parse(text)
        && let Some(password) = url.password().filter(|password| password.len() > 8)
        // As it was taken, without control characters: nothing else in it may happen to be the same.
        && url.as_str().matches(password).count() == 1
    {
        assert!(!shown.contains(password), "{shown}");
    }
}

fn resume_tokens(text: &str) {
    if let Ok(position) = live::parse_token(text) {
        assert_eq!(live::parse_token(&live::token(position)), Ok(position));
    }
    let ticket = Ticket::of(&pb::ExportReadingsRequest::default());
    // The fingerprint is not for a fuzzer to guess.
    if let Ok(place) = ticket.place(&text.replace('#', ticket.fingerprint())) {
        assert_eq!(ticket.place(&ticket.token(&place)), Ok(place));
    }
}

fn page_token(text: &str) {
    let mut violations = Violations::new();
    let last = parse::page_token(&mut violations, text);
    if violations.into_result().is_ok() && !text.is_empty() {
        assert_eq!(parse::next_page_token(last), text);
    }
}

fn struct_of(bytes: &[u8]) {
    if let Ok(object) = prost_types::Struct::decode(bytes)
        && let Ok(json) = structs::to_json(&object)
    {
        assert_eq!(structs::to_json(&structs::from_json(&json)), Ok(json));
    }
}

fn times(bytes: &[u8]) {
    if let Ok(proto) = prost_types::Timestamp::decode(bytes)
        && let Ok(time) = Timestamp::from_proto(&proto)
    {
        assert_eq!(Timestamp::from_proto(&time.to_proto()), Ok(time));
    }
    if let Ok(proto) = prost_types::Duration::decode(bytes) {
        let _ = duration_from_proto(&proto);
    }
}

fn command_line(text: &str) {
    let _ = cli::parse::duration(text);
    let _ = cli::parse::time(text);
    let _ = cli::parse::device(text);
    let _ = cli::parse::selector(text);
    let _ = cli::parse::label(text);
    let _ = cli::parse::json_object(text);
}
