-- What was added to the times of a chunk's readings as they came in, as their device's clock was known to be off: NULL where nothing was,
-- else a JSON array of runs, [[k, micros], ...], each for the elements of `points` from k to the next one's; the first begins with 0.
ALTER TABLE chunks ADD COLUMN clock_corrections text;

-- `device_time` is the time by the device's clock; `time` where nothing was added to it.
--
-- All readings that are merged. A range of time is quick when it is said twice: with time_us, and so that only chunks that
-- reach into it are opened, chunk_last_us >= its begin AND chunk_first_us < its end.
CREATE OR REPLACE VIEW readings AS
SELECT devices.id AS device, sensors.name AS sensor, sensors.unit AS unit,
       timestamptz 'epoch' + at.time_us * interval '1 microsecond' AS time,
       CASE encoding
           WHEN 'decimal' THEN (value_base + v::bigint) / value_divisor
           WHEN 'integer' THEN value_base + v::bigint
           WHEN 'real'    THEN v::double precision
       END AS value,
       CASE encoding WHEN 'text' THEN v END AS text,
       at.time_us, first_time AS chunk_first_us, last_time AS chunk_last_us,
       timestamptz 'epoch' + (at.time_us - CASE WHEN clock_corrections IS NULL THEN 0 ELSE (
           SELECT (run ->> 1)::bigint FROM json_array_elements(clock_corrections::json) WITH ORDINALITY AS runs (run, place)
           WHERE (run ->> 0)::bigint < number ORDER BY place DESC LIMIT 1
       ) END) * interval '1 microsecond' AS device_time
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
