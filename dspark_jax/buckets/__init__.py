"""Files in buckets, gs:// and s3://: a working directory (`mirror`), and what is only read (`inputs`).

Everything here works on local folders: ArrayRecord, safetensors and Orbax want files that can be mapped, renamed and
read at random. What is finished is put into the bucket, and what is needed of it is fetched. `store` has the few
operations that buckets have, `lock` keeps two commands from writing in one place.
"""
