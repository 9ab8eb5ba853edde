-- Readings of one sensor in the order of time, merged from the log: derived, for reading. Chunks of a sensor never overlap.
--
-- `points` is a JSON array with an element for each reading; the columns say what an element k is:
--   time_unit = 0                      v                  at time_base + k * time_step
--   time_unit > 0 and time_factor > 0  t * time_factor + v ┐
--   time_unit > 0 and time_factor = 0  [t, v]             ┴ at time_base + k * time_step + t * time_unit
-- and `encoding` what v is: 'decimal' (value_base + v) / value_divisor, 'integer' value_base + v, 'real' and 'text' v itself.
CREATE TABLE chunks (
    chunk_id      INTEGER PRIMARY KEY,
    sensor_id     INTEGER NOT NULL,
    first_time    INTEGER NOT NULL,
    last_time     INTEGER NOT NULL,
    readings      INTEGER NOT NULL,
    complete      INTEGER NOT NULL, -- 1: large enough to stay as it is
    time_base     INTEGER NOT NULL,
    time_step     INTEGER NOT NULL,
    time_unit     INTEGER NOT NULL,
    time_factor   INTEGER NOT NULL,
    encoding      TEXT    NOT NULL,
    value_base    INTEGER NOT NULL,
    value_divisor REAL    NOT NULL,
    points        TEXT    NOT NULL
) STRICT;

-- All that there is to know of a sensor's chunks without reading them.
CREATE INDEX chunks_by_sensor ON chunks (sensor_id, last_time, first_time, complete, readings);
-- The oldest chunks, for retention.
CREATE INDEX chunks_by_last_time ON chunks (last_time);

-- What the log holds is behind 'merged', or on its way out: nobody looks for a device's rows of it by an index, which
-- would cost each append.
DROP INDEX log_by_device;

-- 'merged': all of the log up to it is in the chunks.
INSERT INTO progress (name, position) VALUES ('merged', 0);

-- All readings that are merged. A range of time is quick when it is said twice: with time_us, and so that only chunks that
-- reach into it are opened, chunk_last_us >= its begin AND chunk_first_us < its end.
CREATE VIEW readings AS
SELECT device, sensor, unit,
       strftime('%Y-%m-%dT%H:%M:%S', (time_us - fraction) / 1000000, 'unixepoch') || printf('.%06dZ', fraction) AS time,
       CASE encoding
           WHEN 'decimal' THEN (value_base + v) / value_divisor
           WHEN 'integer' THEN value_base + v
           WHEN 'real'    THEN CASE v WHEN 'NaN' THEN NULL WHEN 'Infinity' THEN 9e999 WHEN '-Infinity' THEN -9e999 ELSE v END
       END AS value,
       CASE encoding WHEN 'text' THEN v END AS text,
       time_us, chunk_first_us, chunk_last_us
FROM (
    SELECT device, sensor, unit, encoding, value_base, value_divisor, v, time_us, chunk_first_us, chunk_last_us,
           (time_us % 1000000 + 1000000) % 1000000 AS fraction
    FROM (
        SELECT devices.id AS device, sensors.name AS sensor, sensors.unit AS unit,
               chunks.encoding AS encoding, chunks.value_base AS value_base, chunks.value_divisor AS value_divisor,
               chunks.first_time AS chunk_first_us, chunks.last_time AS chunk_last_us,
               chunks.time_base + point.key * chunks.time_step + CASE
                   WHEN chunks.time_unit = 0 THEN 0
                   WHEN chunks.time_factor > 0 THEN point.value / chunks.time_factor * chunks.time_unit
                   ELSE (point.value ->> 0) * chunks.time_unit
               END AS time_us,
               CASE
                   WHEN chunks.time_unit = 0 THEN point.value
                   WHEN chunks.time_factor > 0 THEN point.value % chunks.time_factor
                   ELSE point.value ->> 1
               END AS v
        FROM chunks
        JOIN sensors ON sensors.sensor_id = chunks.sensor_id
        JOIN devices ON devices.device_id = sensors.device_id
        JOIN json_each(chunks.points) AS point
    )
);
