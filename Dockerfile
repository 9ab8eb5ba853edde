# The gateway in an image of nothing else: a static program and a data directory. The simulated fleet has an image of its own.
#
#   docker build -t tidegate .
#   docker build -t tidegate-fleet --target fleet .
#   docker run --read-only --cap-drop ALL -v tidegate-data:/data -p 127.0.0.1:50051:50051 -e TIDEGATE_INSECURE=true tidegate
#
# Behind a mirror: --build-arg RUST_IMAGE=mirror.example/library/rust:1-bookworm
# To try a change out: --build-arg PROFILE=quick, which is built quicker, and runs slower.
ARG RUST_IMAGE=rust:1-bookworm

FROM ${RUST_IMAGE} AS build
ARG PROFILE=release
WORKDIR /src
# Static, so that the final image needs no libraries. For the programs alone, which naming the target comes to: procedural macros
# are shared libraries. Without symbols, which are half of a program; a panic tells its place all the same.
ENV RUSTFLAGS="-C target-feature=+crt-static" CARGO_PROFILE_RELEASE_STRIP=symbols

# The dependencies, before the sources are there: this layer is built anew only when they change.
COPY Cargo.toml Cargo.lock ./
RUN rustc -vV | sed -n 's/^host: //p' >/target \
    && mkdir -p src/bin/tidegate-fleet benches /programs /data \
    && for file in build.rs src/main.rs src/bin/tidegate-fleet/main.rs benches/batch.rs benches/history.rs; do echo 'fn main() {}' >"$file"; done \
    && touch src/lib.rs \
    && cargo build --profile "$PROFILE" --locked --target "$(cat /target)"

COPY build.rs ./
COPY proto proto
COPY migrations migrations
COPY benches benches
COPY src src
# cargo goes by the times of files, and the sources may be older than what stood in for them.
RUN find build.rs benches src -name '*.rs' -exec touch {} + \
    && cargo build --profile "$PROFILE" --locked --target "$(cat /target)" --bins \
    && cp target/"$(cat /target)"/"$PROFILE"/tidegate target/"$(cat /target)"/"$PROFILE"/tidegate-fleet /programs/

FROM scratch AS fleet
LABEL org.opencontainers.image.title="Tidegate's simulated fleet" \
      org.opencontainers.image.description="Simulated and replayed devices that verify what a Tidegate gateway made of their readings" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /programs/tidegate-fleet /usr/local/bin/
USER 65532:65532
ENV PATH=/usr/local/bin
# It ends a run on ctrl-C.
STOPSIGNAL SIGINT
ENTRYPOINT ["tidegate-fleet"]

# The last one is what is built without --target.
FROM scratch AS gateway
LABEL org.opencontainers.image.title="Tidegate" \
      org.opencontainers.image.description="An IoT telemetry ingestion gateway: gRPC in, SQLite or PostgreSQL out" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /programs/tidegate /usr/local/bin/
COPY --from=build --chown=65532:65532 /data /data
USER 65532:65532
WORKDIR /data
VOLUME /data
# In a container the loopback addresses are nobody's. SQLite sorts large results in files, and the rest of the file system is
# read-only.
ENV PATH=/usr/local/bin \
    TIDEGATE_GRPC_LISTEN=0.0.0.0:50051 \
    TIDEGATE_HTTP_LISTEN=0.0.0.0:9464 \
    TIDEGATE_STORAGE_DATA_DIR=/data \
    SQLITE_TMPDIR=/data
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 CMD ["tidegate", "health"]
ENTRYPOINT ["tidegate"]
