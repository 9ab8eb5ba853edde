-- Readings of one sensor in the order of time, merged from the log: derived, for reading. Chunks of a sensor never overlap.
--
-- `points` is a JSON array with an element for each reading; the columns say what an element k is:
--   time_unit = 0                      v                  at time_base + k * time_step
--   time_unit > 0 and time_factor > 0  t * time_factor + v ┐
--   time_unit > 0 and time_factor = 0  [t, v]             ┴ at time_base + k * time_step + t * time_unit
-- and `encoding` what v is: 'decimal' (value_base + v) / value_divisor, 'integer' value_base + v, 'real' and 'text' v itself.
CREATE TABLE chunks (
    chunk_id      bigint           GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sensor_id     bigint           NOT NULL,
    first_time    bigint           NOT NULL,
    last_time     bigint           NOT NULL,
    readings      bigint           NOT NULL,
    complete      boolean          NOT NULL, -- large enough to stay as it is
    time_base     bigint           NOT NULL,
    time_step     bigint           NOT NULL,
    time_unit     bigint           NOT NULL,
    time_factor   bigint           NOT NULL,
    encoding      text             NOT NULL,
    value_base    bigint           NOT NULL,
    value_divisor double precision NOT NULL,
    points        text             NOT NULL
);

-- All that there is to know of a sensor's chunks without reading them.
CREATE INDEX chunks_by_sensor ON chunks (sensor_id, last_time) INCLUDE (first_time, complete, readings);
-- The oldest chunks, for retention.
CREATE INDEX chunks_by_last_time ON chunks (last_time);

-- What the log holds is behind 'merged', or on its way out: nobody looks for a device's rows of it by an index, which
-- would cost each append.
DROP INDEX IF EXISTS log_by_device;

-- 'merged': all of the log up to it is in the chunks.
INSERT INTO progress (name, position) VALUES ('merged', 0);

-- All readings that are merged. A range of time is quick when it is said twice: with time_us, and so that only chunks that
-- reach into it are opened, chunk_last_us >= its begin AND chunk_first_us < its end.
CREATE VIEW readings AS
SELECT devices.id AS device, sensors.name AS sensor, sensors.unit AS unit,
       timestamptz 'epoch' + at.time_us * interval '1 microsecond' AS time,
       CASE encoding
           WHEN 'decimal' THEN (value_base + v::bigint) / value_divisor
           WHEN 'integer' THEN value_base + v::bigint
           WHEN 'real'    THEN v::double precision
       END AS value,
       CASE encoding WHEN 'text' THEN v END AS text,
       at.time_us, first_time AS chunk_first_us, last_time AS chunk_last_us
FROM chunks
JOIN sensors USING (sensor_id)
JOIN devices USING (device_id)
-- A text may have a NUL, which PostgreSQL's own texts can't: it is shown as U+FFFD.
CROSS JOIN LATERAL json_array_elements_text(CASE encoding
    WHEN 'text' THEN regexp_replace(points, '(?<!\\)((?:\\\\)*)\\u0000', '\1\\ufffd', 'g') ELSE points END::json) WITH ORDINALITY AS point (element, number)
CROSS JOIN LATERAL (
    SELECT CASE
               WHEN time_unit = 0 THEN 0
               WHEN time_factor > 0 THEN element::bigint / time_factor
               ELSE (element::json ->> 0)::bigint
           END AS t,
           CASE
               WHEN time_unit = 0 THEN element
               WHEN time_factor > 0 THEN (element::bigint % time_factor)::text
               ELSE element::json ->> 1
           END AS v
) AS parts
CROSS JOIN LATERAL (SELECT time_base + (number - 1) * time_step + t * time_unit AS time_us) AS at;

-- The readings of a sensor from a time on and before another, in the order of chunks.
CREATE FUNCTION readings_between(device text, sensor text, "from" timestamptz, "to" timestamptz)
RETURNS TABLE ("time" timestamptz, value double precision, text text)
LANGUAGE sql STABLE PARALLEL SAFE
AS $$
    WITH asked AS (
        SELECT (extract(epoch FROM $3) * 1000000)::bigint AS begin_us, (extract(epoch FROM $4) * 1000000)::bigint AS end_us
    )
    SELECT readings.time, readings.value, readings.text
    FROM asked, readings
    WHERE readings.device = $1 AND readings.sensor = $2
      AND readings.chunk_last_us >= begin_us AND readings.chunk_first_us < end_us
      AND readings.time_us >= begin_us AND readings.time_us < end_us
$$;
