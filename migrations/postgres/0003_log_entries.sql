-- An entry of the log may hold several batches of a stream that follow one another; `sequence` is that of the last
-- of them, and `batch` has them one behind the other, which is one batch with the frames of all.
ALTER TABLE log ADD COLUMN batches bigint NOT NULL DEFAULT 1;
