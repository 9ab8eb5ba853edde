-- What was added to the times of a chunk's readings as they came in, as their device's clock was known to be off: NULL where nothing was,
-- else a JSON array of runs, [[k, micros], ...], each for the elements of `points` from k to the next one's; the first begins with 0.
ALTER TABLE chunks ADD COLUMN clock_corrections TEXT;

-- `device_time` is the time by the device's clock; `time` where nothing was added to it.
DROP VIEW readings;

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
       time_us, chunk_first_us, chunk_last_us,
       strftime('%Y-%m-%dT%H:%M:%S', (device_time_us - device_fraction) / 1000000, 'unixepoch') || printf('.%06dZ', device_fraction) AS device_time
FROM (
    SELECT device, sensor, unit, encoding, value_base, value_divisor, v, time_us, chunk_first_us, chunk_last_us,
           (time_us % 1000000 + 1000000) % 1000000 AS fraction,
           time_us - added_us AS device_time_us,
           ((time_us - added_us) % 1000000 + 1000000) % 1000000 AS device_fraction
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
               END AS v,
               CASE WHEN chunks.clock_corrections IS NULL THEN 0 ELSE (
                   SELECT run.value ->> 1 FROM json_each(chunks.clock_corrections) AS run
                   WHERE run.value ->> 0 <= point.key ORDER BY run.key DESC LIMIT 1
               ) END AS added_us
        FROM chunks
        JOIN sensors ON sensors.sensor_id = chunks.sensor_id
        JOIN devices ON devices.device_id = sensors.device_id
        JOIN json_each(chunks.points) AS point
    )
);
