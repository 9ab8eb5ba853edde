//! The generated types and services of `proto/tidegate/v1`.
//!
//! Only [`crate::api`], [`crate::client`] and the command line know them; everything below works on [`crate::model`].
#![allow(missing_docs, clippy::all)]

mod codec;

tonic::include_proto!("tidegate.v1");

/// How large a message grows of which there can be several, about: clients of gRPC take 4 MiB at the most unless told otherwise.
pub const MESSAGE_BYTES: usize = 1 << 20;

/// The compiled `.proto` files with their comments and imports, as `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tidegate.v1.binpb"));
