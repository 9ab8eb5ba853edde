//! The RPCs that the gateway serves, from the compiled `.proto` files.

use crate::pb;
use prost::Message;
use prost_types::FileDescriptorSet;
use std::{collections::HashMap, sync::LazyLock};

/// What the layers know of the RPC that a request is for.
#[derive(Debug)]
pub struct Method {
    /// The full name without the leading slash, such as `tidegate.v1.TelemetryService/Upload`; `unknown` for what is not served.
    pub name: String,
    /// Whether either side sends a stream.
    pub streaming: bool,
    /// Whether the client sends a stream and is answered when it has ended.
    pub answers_at_the_end: bool,
    /// To whom it belongs.
    pub family: Family,
    /// Its place in [`Method::all`].
    pub index: usize,
}

/// Who wrote a service: the layers treat what is not the gateway's own differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// The gateway's own.
    Tidegate,
    /// `grpc.health.v1`: probes.
    Health,
    /// `grpc.reflection`: generic clients.
    Reflection,
    /// Not served.
    Unknown,
}

impl Method {
    /// The method of a request path such as `/tidegate.v1.TelemetryService/Upload`.
    pub fn of(path: &str) -> &'static Self {
        let methods = &*METHODS;
        let index = path.strip_prefix('/').and_then(|name| methods.by_name.get(name)).copied().unwrap_or(UNKNOWN);
        &methods.all[index]
    }

    /// All of them, with the unknown one.
    pub fn all() -> &'static [Self] {
        &METHODS.all
    }
}

struct Methods {
    all: Vec<Method>,
    by_name: HashMap<String, usize>,
}

const UNKNOWN: usize = 0;

static METHODS: LazyLock<Methods> = LazyLock::new(|| {
    let mut all =
        vec![Method { name: "unknown".into(), streaming: false, answers_at_the_end: false, family: Family::Unknown, index: UNKNOWN }];
    add(&mut all, Family::Tidegate, pb::DESCRIPTOR_SET);
    add(&mut all, Family::Health, tonic_health::pb::FILE_DESCRIPTOR_SET);
    add(&mut all, Family::Reflection, tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET);
    add(&mut all, Family::Reflection, tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET);
    let by_name = all.iter().skip(1).map(|method| (method.name.clone(), method.index)).collect();
    Methods { all, by_name }
});

fn add(all: &mut Vec<Method>, family: Family, descriptors: &[u8]) {
    let set = FileDescriptorSet::decode(descriptors).expect("the descriptors are compiled in");
    for file in &set.file {
        for service in &file.service {
            for method in &service.method {
                let name = format!("{}.{}/{}", file.package(), service.name(), method.name());
                let streaming = method.client_streaming() || method.server_streaming();
                let answers_at_the_end = method.client_streaming() && !method.server_streaming();
                all.push(Method { name, streaming, answers_at_the_end, family, index: all.len() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_streaming_comes_from_the_contract() {
        let seen = |path| {
            let Method { streaming, family, .. } = Method::of(path);
            (*streaming, *family)
        };
        assert_eq!(seen("/tidegate.v1.TelemetryService/Upload"), (true, Family::Tidegate));
        assert_eq!(seen("/tidegate.v1.TelemetryService/GetUploadPosition"), (false, Family::Tidegate));
        assert_eq!(seen("/tidegate.v1.LiveService/Follow"), (true, Family::Tidegate));
        assert_eq!(seen("/grpc.health.v1.Health/Check"), (false, Family::Health));
        assert_eq!(seen("/grpc.health.v1.Health/Watch"), (true, Family::Health));
        assert_eq!(seen("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"), (true, Family::Reflection));
        for path in ["/tidegate.v1.TelemetryService/Nothing", "tidegate.v1.TelemetryService/Upload", "/unknown", "/", ""] {
            assert_eq!(seen(path), (false, Family::Unknown), "{path}");
        }
        assert!(Method::all().iter().enumerate().all(|(index, method)| method.index == index));
    }
}
