"""How to make a model of one's own: three complete examples, to be read, run and copied.

A model is a package of two files named after its model_type, and more where a part reads better
alone:

    configuration_my_new_model.py    what the model is: fields, defaults, ranges, parallel plans
    modeling_my_new_model.py         what it computes: a body, and heads that name the body

1. The configuration. Derive from modeling/decoder_config.py's DecoderConfig, or from a family's
   configuration that has the fields already. A field is a line with a type and a default; a wrong
   name, type or range raises when a configuration is made.
2. The body. Derive a `...PreTrainedModel` from DecoderPreTrainedModel, which holds the
   configuration's class and how parameters are initialised, and a body from it and DecoderModel.
   Replace only what differs: `make_embedding`, `layer_class`, and of a layer `make_attention`,
   `make_mlp`, `make_norm`, `forward`. Names of modules are names in the checkpoint.
3. The heads. CausalLM, and the classes of modeling/heads.py written first among the bases, take the
   body as `body_class`. A module made after `super().__init__` takes the place of theirs.
   An encoder builds on modeling/families/bert/ in the same way: body_bert.py's BertModel names the
   classes of its embeddings and layers, and the heads of modeling_bert.py their body.
4. The name. `swathe.register_model` makes the Auto classes find it. The examples do so in their
   `register()`, once, when it is called; importing them changes nothing.

my_new_model       Llama's computation with biases in the MLP; fields, rules and a module of its own
my_new_model_2     Llama's configuration under Gemma's computation: norms by 1 + weight, embeddings
                   times sqrt(hidden_size)
dummy_bert         BERT whose positions may be relative, as an encoder, or as a decoder with a cache
                   that reads another encoder's states

    import swathe
    from swathe.modeling.examples import my_new_model

    my_new_model.register()
    config = swathe.AutoConfig.for_model(
        "my_new_model", vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2
    )
    model = swathe.AutoModelForCausalLM.from_config(config)

A model that swathe itself ships is a folder in modeling/families/ instead, and needs no register().
Tests prove such a model by comparing it with another that computes the same, or with the definition
written as a loop: see tests/models/test_examples.py and test_dummy_bert_relative.py.
"""
