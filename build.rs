//! Compiles `proto/` without protoc, and makes the descriptor set that reflection serves.

use prost::Message;
use prost_types::field_descriptor_proto::Type;
use std::{env, fs, path::PathBuf};

const PROTO_ROOT: &str = "proto";

/// The fields of type `Batch` that the gateway takes and gives as the bytes they are on the wire.
///
/// Protobuf encodes a message field and a bytes field alike, so the Rust code generated with these fields as `bytes` speaks
/// the published contract, and what was received can be stored and shown without being encoded again.
const RAW_BATCHES: [(&str, &str); 3] = [("UploadRequest", "batch"), ("LinkBatch", "batch"), ("LiveReadings", "batch")];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={PROTO_ROOT}");
    println!("cargo:rerun-if-changed=migrations");

    let mut files: Vec<PathBuf> = fs::read_dir("proto/tidegate/v1")?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "proto"));
    files.sort();

    let mut compiler = protox::Compiler::new([PROTO_ROOT])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(&files)?;

    // With the comments, so that generic clients can show them.
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("tidegate.v1.binpb");
    fs::write(descriptors, compiler.encode_file_descriptor_set())?;

    let mut set = prost_types::FileDescriptorSet::decode(compiler.encode_file_descriptor_set().as_slice())?;
    let mut rewritten = 0;
    for message in set.file.iter_mut().flat_map(|file| &mut file.message_type) {
        for field in &mut message.field {
            if RAW_BATCHES.contains(&(message.name.as_deref().unwrap_or(""), field.name.as_deref().unwrap_or(""))) {
                field.set_type(Type::Bytes);
                field.type_name = None;
                rewritten += 1;
            }
        }
    }
    assert_eq!(rewritten, RAW_BATCHES.len(), "a field of RAW_BATCHES is not in the .proto files");

    // Without the generated `connect` constructors: DeviceLinkService has an RPC of that name.
    let codec = "crate::pb::codec::SmallBuffers";
    tonic_prost_build::configure().build_transport(false).codec_path(codec).bytes(".tidegate.v1").compile_fds(set)?;
    Ok(())
}
