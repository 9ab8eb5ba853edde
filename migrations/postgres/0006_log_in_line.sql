-- An entry that fits a page stays in it, whatever the server's pages are. Out of line it would go in pieces of 2 KB, each with an entry of an index.
DO $$
BEGIN
    EXECUTE format('ALTER TABLE log SET (toast_tuple_target = %s)', current_setting('block_size')::integer - 32);
END
$$;
