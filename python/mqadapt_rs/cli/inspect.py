"""`mqadapt inspect`."""

from __future__ import annotations

from mqadapt_rs.cli.options import Debug, Family, Json, Src


def inspect(src: Src, family: Family = None, json: Json = False, debug: Debug = False) -> None:
    """Show the shape and the size of a model, and the K/V heads of its layers."""
    import mqadapt_rs
    from mqadapt_rs.cli import output

    info = mqadapt_rs.inspect(src)
    if json:
        output.print_json(info)
        return
    rows = {
        "model type": info["model_type"],
        "layers": info["num_hidden_layers"],
        "query heads": info["num_attention_heads"],
        "K/V heads (layers: heads)": output.in_runs(info["num_key_value_heads"]),
        "values per head": info["head_dim"],
        "parameters": f"{info['parameters']:,}",
        "K/V cache per token": output.in_bytes(info["kv_bytes_per_token"]),
        "weights": f"{output.in_bytes(info['bytes'])}, {info['dtype']}",
    }
    output.print_table(src, rows)
