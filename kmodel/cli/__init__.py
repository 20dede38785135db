"""The kmodel command."""
